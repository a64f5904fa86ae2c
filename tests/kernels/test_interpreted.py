"""The kernels in Triton's interpreter, in a process apart: their operations' tests, and those in `interpreted/`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

pytest.importorskip("triton", reason="there are no kernels without Triton")


OPS = ("velocity_loss", "localization_loss", "low_rank", "concept_attention")


@pytest.mark.parametrize(
    "what", [*(f"ops/test_{name}.py" for name in OPS), "models/test_losses.py", "kernels/interpreted"]
)
def test_under_the_interpreter(what: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTUNLEARN_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not torch_backend"]
    result = subprocess.run([*command, TESTS / what], env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
