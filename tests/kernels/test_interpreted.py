"""Run the tests of the kernels' operations, and those in `interpreted/`, in processes with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastunlearn.ops.dispatch import KERNELS

TESTS = Path(__file__).parents[1]

pytest.importorskip("triton", reason="there are no kernels without Triton")


# Every operation with a kernel has its tests in a file of its name. The slowest files run in two processes, so that the
# workers of pytest-xdist can share them.
SPLIT = {
    "ops/test_low_rank_localization_loss.py": "test_grid and not gradcheck",
    "kernels/interpreted": "test_operators",
}
TESTED_ELSEWHERE = {"negatively_guided_velocity_loss"}  # with velocity_loss
FILES = [f"ops/test_{op}.py" for op, kernel in KERNELS.items() if kernel and op not in TESTED_ELSEWHERE]
PARTS = [
    [path, *selection]
    for path in (
        *SPLIT,
        *(file for file in FILES if file not in SPLIT),
        "models/test_losses.py",
        "models/test_losses_with_erasers.py",
    )
    for selection in ([["-k", SPLIT[path]], ["-k", f"not ({SPLIT[path]})"]] if path in SPLIT else [[]])
]


@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_under_the_interpreter(part: list[str]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTUNLEARN_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not torch_backend"]
    command += [str(TESTS / part[0]), *part[1:]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


SCRIPT = """
import torch
from fastunlearn import LowRankOutput, concept_attention, localization_loss, velocity_loss

torch.manual_seed(0)
hidden, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((2, 32, 16), (64, 16), (64,)))
query, key, prediction, target = (torch.randn(1, 2, 32, 32).bfloat16() for _ in range(4))
mask = torch.rand(2, 32) > 0.5


def results(backend):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias, prediction)]
    low_rank = localization_loss([LowRankOutput(*leaves[:3])], mask, backend=backend).loss
    velocity = velocity_loss(leaves[3], target, backend=backend).loss
    attention = concept_attention(query, key, [1, 2], backend=backend)
    return low_rank.detach(), attention, *torch.autograd.grad(low_rank + velocity, leaves)


for by_kernel, by_torch in zip(results({backend!r}), results("torch"), strict=True):
    error, size = (by_kernel - by_torch).abs().max().item(), by_torch.abs().max().item()
    assert by_kernel.dtype == by_torch.dtype and error <= {bound} * size, (error, size)
"""


@pytest.mark.parametrize("backend", ["triton", None])
def test_bfloat16_is_exact_in_a_script_that_prepares_nothing(backend: str | None) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTUNLEARN_BACKEND": "" if backend else "triton"}
    # Half a unit in the last place of bfloat16, where the two round a float32 to different sides.
    script = SCRIPT.format(backend=backend, bound=2**-8)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
