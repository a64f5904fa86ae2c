"""Times the losses, forward and backward, against the same losses in plain PyTorch, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastunlearn.bench.cases import Case, case_makers
from fastunlearn.bench.command import check_counts, one_line_errors, option_parser, write_report
from fastunlearn.bench.meters import MIB, Timer, copy_bandwidth
from fastunlearn.devices import usable_device
from fastunlearn.dtypes import dtype_name
from fastunlearn.ops.dispatch import choose_backend

COMMAND = "fastunlearn.bench.kernels"
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
# The copy whose bandwidth the losses are compared with.
COPY_BYTES = 256 * MIB


def measure(case: Case, timer: Timer, bandwidth: float) -> list[dict[str, Any]]:
    """Compares all results, then times every peer. Returns one row per peer.

    Args:
        case: the operation and its peers.
        timer: measures the time.
        bandwidth: bytes per second of a copy on the same device.

    Raises:
        Disagreement: peers compute different results.
    """
    rows = _remove_peers_that_cannot_compile(case)
    case.check()
    for name, peer in case.timed().items():
        seconds = timer(peer)
        bytes_per_second = case.floor / seconds
        rows.append(
            {
                "peer": name,
                "seconds": seconds,
                "host_seconds": timer.host_seconds(peer),
                "floor_bytes": case.floor,
                "bytes_per_second": bytes_per_second,
                "of_copy": bytes_per_second / bandwidth,
            }
        )
    ours = next(row["seconds"] for row in rows if row["peer"] == "fastunlearn")
    for row in rows:
        row.update(op=case.name, size=case.size)
        if "seconds" in row:
            row["times_ours"] = row["seconds"] / ours
    return rows


def _remove_peers_that_cannot_compile(case: Case) -> list[dict[str, Any]]:
    """Removes the peers that cannot be compiled on this machine. Returns a row for each of them."""
    rows = []
    for name, peer in case.timed().items():
        try:
            peer()
        except Exception as error:
            if "compiled" not in name:
                raise
            rows.append({"peer": name, "unavailable": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
            del case.peers[name]
    return rows


def row_text(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    start = f"{row['op']:<24} {row['size']:<13} {row['peer']:<15}"
    if "unavailable" in row:
        return f"{start} unavailable: {row['unavailable'][:80]}"
    return (
        f"{start} {row['seconds'] * 1e3:>9.3f} {row['host_seconds'] * 1e3:>9.3f} {row['bytes_per_second'] / 1e9:>8.1f} "
        f"{row['of_copy']:>7.0%} {row['times_ours']:>7.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it if asked to."""
    parser = option_parser(COMMAND, __doc__)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of the velocities or eraser outputs (default: %(default)s)",
    )
    parser.add_argument(
        "--op", choices=("velocity", "localization"), help="measure only these losses (default: measure both)"
    )
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="SIZE",
        help="sizes of the tensors: small, real (the models' latents), synthetic (64 MiB to 4 GiB), or a number of MiB "
        "(default: real and synthetic on a GPU, small on a CPU)",
    )
    parser.add_argument(
        "--runs", type=int, default=20, metavar="N", help="report the median of N runs (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    with one_line_errors(COMMAND, ValueError):
        check_counts(options, runs=1)
        device = usable_device(options.device)
        sizes = options.size or (["small"] if device.type == "cpu" else ["real", "synthetic"])
        makers = case_makers(sizes, DTYPES[options.dtype], device)
    timer = Timer(device, options.runs)
    bandwidth = copy_bandwidth(timer, COPY_BYTES)
    print(f"{device}, {options.dtype}; a copy moves {bandwidth / 1e9:.1f} GB/s")
    print(f"fastunlearn runs on the backend {choose_backend('velocity_loss', device).name!r}")
    print(f"{'op':<24} {'size':<13} {'peer':<15} {'ms':>9} {'host ms':>9} {'GB/s':>8} {'of copy':>7} {'/ ours':>7}")
    rows = []
    for name, make in makers:
        if options.op is None or name.startswith(options.op):
            with one_line_errors(COMMAND):
                case_rows = measure(make(), timer, bandwidth)
            print(*map(row_text, case_rows), sep="\n", flush=True)
            rows += case_rows
    results = {"dtype": options.dtype, "runs": options.runs, "copy_bytes_per_second": bandwidth, "rows": rows}
    write_report(options.output, COMMAND, arguments, results)


if __name__ == "__main__":
    main()
