"""What `fastunlearn verify` does: the grid of cases on a device, and a table of the worst errors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

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
    """Run every case, print a line for every operation and dtype, and what failed; whether nothing did.

    Args:
        device: where to run.
        ops: which operations.
        dtypes: which dtypes.
        backend: which backend; the one that `choose_backend` picks if None.
    """
    print(f"{'op':<32} {'dtype':<9} {'backend':<8} {'cases':>5} {'failed':>6}  worst error, eager's there, of bound")
    failures = []
    # Interpreted kernels would round to bfloat16 otherwise than hardware does.
    with exact_bfloat16() if is_interpreted() else contextlib.nullcontext():
        for op in ops:
            for dtype in dtypes:
                # What has no kernel, or takes no backend, runs on what there is.
                is_there = backend != "triton" or has_kernel(op, device, dtype)
                of_op = backend if is_there and op != "negatively_guided_velocity" else None
                name = choose_backend(op, device, of_op, dtype).name
                grid = cases([op], [dtype])
                worst: list[Comparison] = []
                failed = 0
                for case in grid:
                    try:
                        worst += case.run(device, of_op)
                    except Exception as error:  # whatever a broken compiler or driver raises
                        failed += 1
                        failures.append(f"{op}, {dtype}, {case.name}: {type(error).__name__}: {error}")
                at = max(worst, key=lambda x: x.error / x.bound if x.bound else 0.0, default=None)
                shown = "" if at is None or not at.bound else _shown(at)
                of_dtype = str(dtype).removeprefix("torch.")
                print(f"{op:<32} {of_dtype:<9} {name:<8} {len(grid):>5} {failed:>6}  {shown}", flush=True)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(failures)} cases failed" if failures else f"all passed on {device}")
    return not failures


def _shown(x: Comparison) -> str:
    return f"{x.what}: {x.error:.1e}, {x.eager_error:.1e}, {x.error / x.bound:.0%}"
