"""What `fastunlearn verify` does: run the grid of cases on a device and print the worst errors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from fastunlearn.dtypes import dtype_name
from fastunlearn.ops.dispatch import OPS, choose_backend, has_kernel
from fastunlearn.testing.cases import DTYPES, cases
from fastunlearn.testing.error_bound import Comparison
from fastunlearn.testing.interpreter import exact_bfloat16, is_interpreted


def verify(
    device: torch.device,
    ops: Sequence[str] = OPS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backend: str | None = None,
) -> bool:
    """Run every case, print one line per operation and dtype, then the failures.

    Args:
        device: where to run.
        ops: the operations.
        dtypes: the dtypes.
        backend: the backend; None for the one that `choose_backend` picks. That one also runs where "triton" has no
            kernel.

    Returns:
        Whether all cases passed.
    """
    print(
        f"{'op':<32} {'dtype':<9} {'backend':<8} {'cases':>5} {'failed':>6}  worst error, eager's error, share of bound"
    )
    failures: list[str] = []
    # The interpreter rounds to bfloat16 differently from hardware.
    with exact_bfloat16() if is_interpreted() else contextlib.nullcontext():
        for op in ops:
            for dtype in dtypes:
                failures += _verify_op(op, dtype, device, backend)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(failures)} cases failed" if failures else f"all passed on {device}")
    return not failures


def _verify_op(op: str, dtype: torch.dtype, device: torch.device, backend: str | None) -> list[str]:
    """Run the cases of one operation and dtype, print their line, and return what failed."""
    # `negatively_guided_velocity` takes no backend.
    if op == "negatively_guided_velocity" or (backend == "triton" and not has_kernel(op, device, dtype)):
        backend = None
    name = choose_backend(op, device, backend, dtype).name
    grid = cases([op], [dtype])
    comparisons: list[Comparison] = []
    failures = []
    for case in grid:
        try:
            comparisons += case.run(device, backend)
        except Exception as error:  # whatever a broken compiler or driver raises
            failures.append(f"{op}, {dtype}, {case.name}: {type(error).__name__}: {error}")
    worst = max(comparisons, key=lambda x: x.error / x.bound if x.bound else 0.0, default=None)
    worst_error = "" if worst is None or not worst.bound else _format(worst)
    counts = f"{len(grid):>5} {len(failures):>6}"
    print(f"{op:<32} {dtype_name(dtype):<9} {name:<8} {counts}  {worst_error}", flush=True)
    return failures


def _format(x: Comparison) -> str:
    return f"{x.what}: {x.error:.1e}, {x.eager_error:.1e}, {x.error / x.bound:.0%}"
