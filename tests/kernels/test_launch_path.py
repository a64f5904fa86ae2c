"""Every kernel passes through Triton's own binder, compiler, loader and launcher, over a driver without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import pytest

pytest.importorskip("triton", reason="there are no kernels without Triton")
if fake_gpu.COMPILER is None or sys.platform != "linux":
    pytest.skip("the driver without a GPU needs Linux and a C compiler", allow_module_level=True)

from launch_path_worker import problems

WORKER = Path(__file__).parents[1] / "workers/launch_path_worker.py"
KERNELS = Path(__file__).parents[2] / "kernels"


def test_every_kernel_is_bound_compiled_and_launched(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, WORKER], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    counts = {name: (int(n), int(m)) for name, n, m in re.findall(r"(\w+): launched (\d+) .* (\d+)", result.stdout)}
    source = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    assert counts.keys() == set(re.findall(r"def (\w+_kernel)\(", source))
    # All calls are made twice. The second time compiles nothing.
    assert all(launched >= 2 * compiled > 0 for launched, compiled in counts.values()), result.stdout


WANTED: Any = SimpleNamespace(kernel=SimpleNamespace(__name__="some_kernel"), options={"num_warps": 4})
VALUES = [0x7F0000001000, -3, 2**31 - 1, 0.1, -(2**40)]
SENT = [(8, 0x7F0000001000), (4, 2**32 - 3), (4, 2**31 - 1), (4, 0x3DCCCCCD), (8, 2**64 - 2**40)]
SCRATCH = [(8, 0), (8, 0)]


def reached(**changes: Any) -> fake_gpu.RecordedLaunch:
    launch = fake_gpu.RecordedLaunch("some_kernel", (3, 1, 1), (128, 1, 1), 0, 32, SENT + SCRATCH)
    return launch._replace(**changes)


def test_a_launch_as_it_was_asked_for() -> None:
    assert problems(WANTED, VALUES, reached()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kernel": "another_kernel"}, "expected a launch of some_kernel, got another_kernel"),
        ({"block": (64, 1, 1)}, "got blocks of (64, 1, 1)"),
        ({"grid": (0, 1, 1)}, "a grid of (0, 1, 1)"),
        ({"parameters": SENT[:2]}, "expected 5 parameters, got 2"),
        ({"parameters": [*SENT[:3], (4, 0x3DCCCCCC), SENT[4]]}, "expected parameter 3 to be 0.1"),
        (
            {"parameters": [(8, 0x7F0000001010), *SENT[1:]]},
            "expected parameter 0 to be 139637976731648, got 1396379767",
        ),
        ({"parameters": [*SENT[:2], (4, 1), *SENT[3:]]}, "expected parameter 2 to be 2147483647, got 1 in 4 bytes"),
        ({"parameters": [*SENT[:4], (4, 0)]}, "expected parameter 4 to be"),
        ({"parameters": [*SENT, (8, 7)]}, "expected only scratch memory behind the parameters, got [(8, 7)]"),
    ],
)
def test_a_wrong_launch_is_found(changes: dict[str, Any], problem: str) -> None:
    (found,) = problems(WANTED, VALUES, reached(**changes))
    assert problem in found
