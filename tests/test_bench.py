from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastunlearn.bench import cases, kernels


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


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is on Linux")
def test_every_byte_is_the_floor_s() -> None:
    command = [sys.executable, "-m", "fastunlearn.bench.traffic"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    _, *rows = result.stdout.splitlines()
    assert len(rows) == 10
    for row in rows:
        moved, floor, ratio = re.findall(r" ([\d,]+) +([\d,]+) +(\d\.\d\d) ", row)[0]
        assert moved == floor
        assert ratio == "1.00"
