from __future__ import annotations

import contextlib
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastunlearn.bench import algorithms, cases, kernels, meters, whole_models
from fastunlearn.bench.agreement import Disagreement


def test_floors_match_a_calculation_by_hand() -> None:
    shape = (1, 2, 3, 4, 6)
    n = 2 * 3 * 4 * 6
    assert cases.velocity_case("", shape).floor == (3 * n + n) * 4
    assert cases.velocity_case("", shape, guided=False, dtype=torch.bfloat16).floor == (2 * n + n) * 2
    case = cases.localization_case("", (2, 8, 4), 3)
    mask = cases.random_tensors((2, 8), [torch.float32])[0] > 0
    assert 0 < int(mask.sum()) < 16
    assert case.floor == 3 * (int((~mask).sum()) * 4 + 2 * 8 * 4) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_agree(dtype: torch.dtype) -> None:
    small_cases = [make() for _, make in cases.case_makers(["small"], dtype, "cpu")]
    assert {case.name for case in small_cases} == {
        "guided velocity",
        "guided velocity, masked",
        "preservation",
        "localization, 2 layers",
    }
    for case in small_cases:
        del case.peers["seed, compiled"]
        case.check()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile fails, and the copy that measures the bandwidth is small."""

    def refuse(_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cases, "_compiled", refuse)
    monkeypatch.setattr(kernels, "COPY_BYTES", meters.MIB)


@pytest.mark.usefixtures("no_compiler")
def test_no_time_is_reported_when_losses_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "plain_velocity_loss", lambda p, u, c, m: (p - u).abs().mean())
    with pytest.raises(
        SystemExit, match="no time is reported: guided velocity .* expected a difference of at most .*, got "
    ):
        kernels.main(["--device", "cpu", "--op", "velocity", "--runs", "1"])
    assert "guided velocity" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_compiler")
def test_peers_that_cannot_compile_are_reported_and_the_others_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "cpu.json"
    kernels.main(["--device", "cpu", "--dtype", "float32", "--runs", "2", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "unavailable: RuntimeError: no compiler" in printed
    report = json.loads(output.read_text())
    assert not list(output.parent.glob("*.partial"))
    assert {"command", "commit", "environment", "dtype"} <= report.keys()
    measured = [row for row in report["rows"] if "seconds" in row]
    assert len(measured) == 8
    for row in measured:
        assert row["peer"] in printed
        assert row["seconds"] > 0
        assert row["bytes_per_second"] == pytest.approx(row["floor_bytes"] / row["seconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "--size: expected 'small', 'real', 'synthetic' or a number of MiB to 65536, got 'huge'"),
        (["--size", "0"], "or a number of MiB to 65536, got '0'"),
        (["--size", "1" * 5000], "or a number of MiB to 65536, got '111"),
        (["--device", "cpu", "--runs", "-1"], "--runs: expected a number from 1 to 1000000, got -1"),
        (["--device", "cpu", "--runs", str(10**30)], f"--runs: expected a number from 1 to 1000000, got {10**30}"),
        (["--device", "nowhere"], "nowhere"),
        (["--device", "cpu", "--runs", "0"], "--runs: expected a number from 1 to 1000000, got 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        kernels.main(arguments)


@pytest.fixture
def small_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One small layer, a softmax that fits into memory and one that does not, and the demo at a batch size of 1."""
    layer = algorithms.Layer(tokens=300, features=96, heads=2, channels=16)
    monkeypatch.setattr(algorithms, "LAYERS", {"cogvideox-2b": layer})
    monkeypatch.setattr(algorithms, "ATTENTION_SIZES", {"cpu": ((128, 300), 128)})
    monkeypatch.setattr(algorithms, "RANK", 8)
    monkeypatch.setattr(whole_models, "DEMO_POINTS", 1)
    gc.freeze()  # the meter collects garbage before every call: it need not search what other modules and tests hold
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_layer")
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is known on Linux")
def test_algorithms_print_tables_and_write_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cpu.json"
    only = ["--only", "localization", "attention", "demo"]
    algorithms.main(["--device", "cpu", "--runs", "1", *only, "--output", str(output)])
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert {"command", "commit", "environment", "runs"} <= report.keys()
    assert [table["table"] for table in report["tables"]] == [
        "localization",
        "localization",
        "concept attention",
        "demo step",
    ]
    peers = [[row["peer"] for row in table["rows"]] for table in report["tables"]]
    assert peers[0] == peers[1] == ["without", "dense, eager", "low rank"]
    assert peers[2] == ["softmax, eager", "without lse", "with lse", "without lse", "with lse"]
    for table in report["tables"]:
        for row in table["rows"]:
            assert row["peer"] in printed
            assert row["seconds"] > 0
            assert row["peak_bytes"] >= 0


def test_a_captured_forward_pass_is_compared_with_a_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    meter = meters.Meter(torch.device("cpu"), 1)
    table = whole_models.captured_forward(meter, layers=1, heads=1, side=8)
    assert [row["peer"] for row in table["rows"]] == ["plain", "captured"]
    assert "64 + 226 tokens" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is known on Linux")
def test_the_meter_measures_peak_memory_and_time() -> None:
    meter = meters.Meter(torch.device("cpu"), 3)
    assert meter.peak_bytes(lambda: torch.ones(16 * meters.MIB)) >= 60 * meters.MIB
    assert meter.peak_bytes(lambda: None) < 16 * meters.MIB
    seconds = meter.seconds({"short": lambda: None, "long": lambda: time.sleep(0.01)})
    assert seconds["long"] >= 0.01 > seconds["short"]


@pytest.mark.usefixtures("small_layer")
@pytest.mark.parametrize(
    ("table", "name", "wrong"),
    [
        ("localization", "plain_localization_loss", lambda outputs, mask: sum(o.square().sum() for o in outputs)),
        ("attention", "concept_attention", lambda query, key, *_, **options: torch.ones(1, key.shape[2])),
    ],
)
def test_no_time_is_reported_when_algorithms_disagree(
    table: str, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(algorithms, name, wrong)
    with pytest.raises(SystemExit, match=r"results disagree, so no time is reported: .* relative difference"):
        algorithms.main(["--device", "cpu", "--only", table, "--runs", "1"])
    assert "with lse" not in capsys.readouterr().out


def test_no_time_is_reported_for_a_captured_pass_with_other_bits_or_fewer_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = meters.Meter(torch.device("cpu"), 1)

    def captures_nothing(*_: object, **__: object) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    monkeypatch.setattr(whole_models, "AttnMapsCapture", captures_nothing)
    with pytest.raises(Disagreement, match="a map of each of 1 layers, got 0"):
        whole_models.captured_forward(meter, layers=1, heads=1, side=8)
    as_velocity_model = whole_models.as_velocity_model

    def noisy(transformer: torch.nn.Module) -> object:
        model = as_velocity_model(transformer)
        return lambda *arguments: model(*arguments) + torch.randn(())

    monkeypatch.setattr(whole_models, "as_velocity_model", noisy)
    with pytest.raises(Disagreement, match="same bits"):
        whole_models.captured_forward(meter, layers=1, heads=1, side=8)


@pytest.mark.usefixtures("small_layer")
def test_no_time_is_reported_when_demo_steps_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = whole_models.EraserOutputsCapture

    def wrong(
        model: torch.nn.Module, erasers: dict[str, torch.nn.Module], outputs: object, *, low_rank: bool
    ) -> object:
        return capture(model, dict(list(erasers.items())[low_rank:]), outputs, low_rank=low_rank)

    monkeypatch.setattr(whole_models, "EraserOutputsCapture", wrong)
    with pytest.raises(Disagreement, match="the demo's step: expected a relative difference"):
        whole_models.demo_step(meters.Meter(torch.device("cpu"), 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "device: expected one that torch can use here, got 'meta'"),
        (["--device", "cpu", "--runs", "0"], "--runs: expected a number from 1 to 1000000, got 0"),
    ],
)
def test_bad_arguments_of_algorithms(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        algorithms.main(arguments)


def test_only_devices_with_a_known_peak_memory_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "usable_device", torch.device)
    with pytest.raises(ValueError, match="--device: expected a CPU or a CUDA GPU, got xpu"):
        meters.measurable_device("xpu")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_kernels_move_exactly_the_floor() -> None:
    command = [sys.executable, "-m", "fastunlearn.bench.traffic", "--size", "small"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    _, *rows = result.stdout.splitlines()
    assert len(rows) == 16
    for row in rows:
        moved, floor, ratio = re.findall(r" ([\d,]+) +([\d,]+) +(\d\.\d\d) ", row)[0]
        assert moved == floor
        assert ratio == "1.00"
