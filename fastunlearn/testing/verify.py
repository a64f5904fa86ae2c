"""What `fastunlearn verify` does: run the grid of cases on a device, print the worst errors and what did not run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastunlearn.dtypes import dtype_name, widest_dtype
from fastunlearn.ops.dispatch import OPS, choose_backend, has_kernel
from fastunlearn.testing.cases import DTYPES, cases
from fastunlearn.testing.error_bound import Comparison
from fastunlearn.testing.interpreter import is_interpreted

_EXPLANATION = """\
error: the worst error, as a share of what is allowed: twice the error of eager torch, plus rounding
eager: the error of eager torch in the same place, as a share of the same
"""


def verify(
    device: torch.device,
    ops: Sequence[str] = OPS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backend: str | None = None,
) -> bool:
    """Run every case, print one line per operation and dtype, then the failures, and the kernels that did not run.

    Args:
        device: where to run.
        ops: the operations.
        dtypes: the dtypes.
        backend: the backend; None for the one that `choose_backend` picks. That one also runs where "triton" has no
            kernel.

    Returns:
        Whether all cases passed.
    """
    print(_EXPLANATION)
    print(f"{'op':<32} {'dtype':<9} {'backend':<8} {'cases':>5} {'failed':>6} {'error':>6} {'eager':>6}  of")
    count, failures = 0, []
    not_run: dict[str, dict[str, None]] = {}  # reason -> operations
    any_kernel_ran = False
    usable = [dtype for dtype in dtypes if dtype != torch.float64 or widest_dtype(device) == torch.float64]
    for op in ops:
        for dtype in usable:
            # `negatively_guided_velocity` takes no backend.
            takes_any = op == "negatively_guided_velocity" or (
                backend == "triton" and not has_kernel(op, device, dtype)
            )
            own_backend = None if takes_any else backend
            name, reason = choose_backend(op, device, own_backend, dtype)
            any_kernel_ran = any_kernel_ran or name == "triton"
            if name != "triton" and has_kernel(op, device, dtype):
                not_run.setdefault(reason, {})[op] = None
            case_count, failed = _verify_op(op, dtype, device, own_backend, name)
            count += case_count
            failures += failed
    for failure in failures:
        print(f"FAILED {failure}")
    if len(usable) < len(dtypes):
        print(f"not run: float64, which {device} lacks")
    for reason, without_kernel in not_run.items():
        print(f"not run: the Triton kernels of {', '.join(without_kernel)}: {reason}")
    where = f"on {device}"
    if not any_kernel_ran:
        where += ", without any Triton kernel"
    elif is_interpreted():
        where += ", kernels in Triton's interpreter"
    print(f"{len(failures)} of {count} cases failed {where}" if failures else f"all {count} cases passed {where}")
    return not failures


def _verify_op(
    op: str, dtype: torch.dtype, device: torch.device, backend: str | None, name: str
) -> tuple[int, list[str]]:
    """Run the cases of one operation and dtype and print their line. Returns how many ran, and what failed."""
    grid = cases([op], [dtype])
    comparisons: list[Comparison] = []
    failures = []
    for case in grid:
        try:
            comparisons += case.run(device, backend)
        except Exception as error:  # whatever a broken compiler or driver raises
            failures.append(f"{op}, {dtype}, {case.name}: {type(error).__name__}: {error}")
    # The results of an empty batch have no elements and no bound.
    worst = max((x for x in comparisons if x.bound), key=lambda x: x.error / x.bound, default=None)
    shares = "" if worst is None else f"{worst.error / worst.bound:>6.0%} {worst.eager_error / worst.bound:>6.0%}"
    counts = f"{len(grid):>5} {len(failures):>6}"
    what = "" if worst is None else worst.what
    print(f"{op:<32} {dtype_name(dtype):<9} {name:<8} {counts} {shares:>13}  {what}", flush=True)
    return len(grid), failures
