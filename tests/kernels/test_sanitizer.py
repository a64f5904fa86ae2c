"""No kernel accesses memory out of bounds, and the checks that show it find a planted error."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "workers/sanitizer_worker.py"

pytest.importorskip("triton", reason="there are no kernels without Triton")


def run_worker(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, name], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["symbolic", "fenced"])
def test_kernels_stay_in_bounds(name: str) -> None:
    result = run_worker(name)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert result.stdout.endswith("clean\n")


def test_the_sanitizer_finds_an_access_out_of_bounds() -> None:
    result = run_worker("symbolic-planted")
    assert "clean" not in result.stdout
    assert "Violation" in result.stdout + result.stderr


def test_the_fences_find_an_access_out_of_bounds() -> None:
    result = run_worker("fenced-planted")
    assert result.returncode == -signal.SIGSEGV, result.stdout + result.stderr
