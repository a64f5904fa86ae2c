"""`fastunlearn verify`: what it says of errors, of failures, and of what it did not run."""

from __future__ import annotations

import re

import pytest
import torch

from fastunlearn.cli import main
from fastunlearn.ops.torch_backend import velocity
from fastunlearn.testing.cases import cases


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "FASTUNLEARN_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def verified(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["verify", "--device", "cpu", "--op", "velocity_loss", *arguments])
    return capsys.readouterr().out


def test_a_cpu_passes_without_kernels_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    out = verified(capsys, "negatively_guided_velocity", "--dtype", "bfloat16", "float64")
    count = len(cases(["velocity_loss", "negatively_guided_velocity"], [torch.bfloat16, torch.float64]))
    assert out.endswith(f"all {count} cases passed on cpu, without any Triton kernel\n")
    # `negatively_guided_velocity` has no kernel that could have run.
    assert re.search(r"^not run: the Triton kernels of velocity_loss: .*Triton", out, re.MULTILINE)


def test_a_backend_that_was_asked_for_is_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    out = verified(capsys, "--dtype", "float16", "--backend", "torch")
    assert "not run: the Triton kernels of velocity_loss: asked for by backend=torch\n" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_errors_are_shares_of_what_is_allowed(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = verified(capsys, "--dtype", dtype)
    (line,) = (line for line in out.splitlines() if line.startswith("velocity_loss"))
    error, eager = map(int, re.findall(r"(\d+)%", line))
    # Eager torch's own error is at most half of what is allowed.
    assert 0 < error < 100
    assert 0 < eager <= 50
    assert "e-" not in out  # no absolute error, which would mean nothing without the size of the result


def test_failures_are_counted_and_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = velocity.sum_of_squares
    monkeypatch.setattr(velocity, "sum_of_squares", lambda norms: 1.1 * right(norms))
    with pytest.raises(SystemExit) as exit_info:
        verified(capsys, "--dtype", "float32")
    assert exit_info.value.code == 1
    out = capsys.readouterr().out
    (failed,) = re.findall(r"^(\d+) of \d+ cases failed on cpu, without any Triton kernel$", out, re.MULTILINE)
    assert int(failed) == out.count("\nFAILED velocity_loss, torch.float32, ") > 10


def test_a_device_without_float64(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastunlearn.testing.verify.widest_dtype", lambda device: torch.float32)
    out = verified(capsys, "--dtype", "float16", "float64")
    assert "not run: float64, which cpu lacks\n" in out
    assert f"all {len(cases(['velocity_loss'], [torch.float16]))} cases passed on cpu" in out
