from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastunlearn.bench import algorithms, cases, kernels


def test_floors_by_hand() -> None:
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
    made = [make() for _, make in cases.makers(["small"], dtype, "cpu")]
    assert {case.name for case in made} == {
        "guided velocity",
        "guided velocity, masked",
        "preservation",
        "localization, 2 layers",
    }
    for case in made:
        del case.peers["seed, compiled"]
        case.check()


def test_no_speed_of_what_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "seed_velocity_loss", lambda p, u, c, m: (p - u).abs().mean())
    with pytest.raises(SystemExit, match="no speed of what disagrees: guided velocity .* is off by"):
        kernels.main(["--device", "cpu", "--op", "velocity", "--runs", "1"])


def test_table_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # What has no compiler says so, and the others are measured all the same.
    def refuse(_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cases, "_compiled", refuse)
    output = tmp_path / "new" / "cpu.json"
    kernels.main(["--device", "cpu", "--dtype", "float32", "--runs", "2", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "not here: RuntimeError: no compiler" in printed
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
        (["--size", "huge"], "size must be 'small', 'real', 'synthetic' or a number of MiB, got 'huge'"),
        (["--device", "nowhere"], "nowhere"),
        (["--device", "cpu", "--runs", "0"], "--runs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        kernels.main(arguments)


@pytest.fixture
def small_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of sizes that take no time, at which tokens x tokens are held and not."""
    layer = algorithms.Layer(tokens=300, features=96, heads=2, channels=16)
    monkeypatch.setattr(algorithms, "LAYERS", {"cogvideox-2b": layer})
    monkeypatch.setattr(algorithms, "ATTENTION_SIZES", {"cpu": ((128, 300), 128)})
    monkeypatch.setattr(algorithms, "RANK", 8)


@pytest.mark.usefixtures("small_layer")
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak of memory is known on Linux")
def test_algorithms_table_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_captured_forward_pass_beside_a_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    meter = algorithms.Meter(torch.device("cpu"), 1)
    table = algorithms.captured_forward(meter, layers=1, heads=1, side=8)
    assert [row["peer"] for row in table["rows"]] == ["plain", "captured"]
    assert "64 + 226 tokens" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak of memory is known on Linux")
def test_the_meter_sees_what_is_held_and_what_takes_long() -> None:
    meter = algorithms.Meter(torch.device("cpu"), 3)
    assert meter.peak_bytes(lambda: torch.ones(16 * cases.MIB)) >= 60 * cases.MIB
    assert meter.peak_bytes(lambda: None) < 16 * cases.MIB
    seconds = meter.seconds({"short": lambda: None, "long": lambda: time.sleep(0.01)})
    assert seconds["long"] >= 0.01 > seconds["short"]


@pytest.mark.usefixtures("small_layer")
@pytest.mark.parametrize(
    ("table", "name", "wrong"),
    [
        ("localization", "seed_localization_loss", lambda outputs, mask: sum(o.square().sum() for o in outputs)),
        ("attention", "concept_attention", lambda query, key, *_, **options: torch.ones(1, key.shape[2])),
    ],
)
def test_no_speed_of_algorithms_that_disagree(
    table: str, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(algorithms, name, wrong)
    with pytest.raises(SystemExit, match=r"no speed of what disagrees: .* relative error"):
        algorithms.main(["--device", "cpu", "--only", table, "--runs", "1"])
    assert "with lse" not in capsys.readouterr().out


def test_no_speed_of_a_forward_pass_with_other_bits_or_fewer_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = algorithms.Meter(torch.device("cpu"), 1)

    def deaf(*_: object, **__: object) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    monkeypatch.setattr(algorithms, "AttnMapsCapture", deaf)
    with pytest.raises(cases.Disagreement, match="a map of each of 1 layers, got 0"):
        algorithms.captured_forward(meter, layers=1, heads=1, side=8)
    as_velocity_model = algorithms.as_velocity_model

    def noisy(transformer: torch.nn.Module) -> object:
        model = as_velocity_model(transformer)
        return lambda *arguments: model(*arguments) + torch.randn(())

    monkeypatch.setattr(algorithms, "as_velocity_model", noisy)
    with pytest.raises(cases.Disagreement, match="same bits"):
        algorithms.captured_forward(meter, layers=1, heads=1, side=8)


def test_no_speed_of_a_demo_step_that_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = algorithms.EraserOutputsCapture

    def wrong(
        model: torch.nn.Module, erasers: dict[str, torch.nn.Module], outputs: object, *, low_rank: bool
    ) -> object:
        return capture(model, dict(list(erasers.items())[low_rank:]), outputs, low_rank=low_rank)

    monkeypatch.setattr(algorithms, "EraserOutputsCapture", wrong)
    with pytest.raises(cases.Disagreement, match="the demo's step: relative error"):
        algorithms.demo_step(algorithms.Meter(torch.device("cpu"), 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "--device must be a CPU or a CUDA GPU, got meta"),
        (["--device", "cpu", "--runs", "0"], "--runs must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_algorithms(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        algorithms.main(arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is on Linux")
def test_every_byte_is_the_floor_s() -> None:
    command = [sys.executable, "-m", "fastunlearn.bench.traffic"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    _, *rows = result.stdout.splitlines()
    assert len(rows) == 16
    for row in rows:
        moved, floor, ratio = re.findall(r" ([\d,]+) +([\d,]+) +(\d\.\d\d) ", row)[0]
        assert moved == floor
        assert ratio == "1.00"
