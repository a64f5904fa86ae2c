"""Run the tests of the kernels' operations, and those in `interpreted/`, in processes with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

pytest.importorskip("triton", reason="there are no kernels without Triton")


# The slowest files run in several processes, so that the workers of pytest-xdist can share them.
PARTS = [
    ["ops/test_velocity_loss.py"],
    ["ops/test_localization_loss.py"],
    ["ops/test_low_rank.py", "-k", "test_grid and not gradcheck"],
    ["ops/test_low_rank.py", "-k", "not test_grid or gradcheck"],
    ["ops/test_concept_attention.py"],
    ["models/test_losses.py"],
    ["kernels/interpreted", "-k", "not test_operators"],
    ["kernels/interpreted", "-k", "test_operators"],
]


@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_under_the_interpreter(part: list[str]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTUNLEARN_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not torch_backend"]
    command += [str(TESTS / part[0]), *part[1:]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
