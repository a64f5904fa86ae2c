"""Time of the losses against their peers: `python -m fastunlearn.bench.kernels`. Runs on a GPU, and on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastunlearn.bench.cases import MIB, Case, Disagreement, makers
from fastunlearn.environment import describe
from fastunlearn.ops.dispatch import choose_backend

DTYPES = ("float16", "bfloat16", "float32")
# More than any GPU's L2.
FLUSH_BYTES = 512 * MIB


class Timer:
    """Medians of a function's time on a device, its inputs not in the L2 cache."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any]) -> float:
        """Seconds a call, after calls enough to compile and to warm up."""
        for _ in range(3):
            function()
        return statistics.median(self._once(function) for _ in range(self.runs))

    def host(self, function: Callable[[], Any]) -> float:
        """Seconds until a call returns, whatever the device still has to do."""
        times = []
        for _ in range(self.runs):
            self._wait()
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        self._wait()
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _once(self, function: Callable[[], Any]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_bandwidth(timer: Timer, nbytes: int) -> float:
    """Bytes a second, read and written, of a copy of `nbytes` on the device."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * nbytes / timer(lambda: target.copy_(source))


def measure(case: Case, timer: Timer, bandwidth: float) -> list[dict[str, Any]]:
    """A row for every peer, whose results have been compared first.

    Raises:
        Disagreement: peers compute different things.
    """
    rows: list[dict[str, Any]] = []
    for name in list(case.timed()):
        try:
            case.timed()[name]()
        except Exception as error:
            if "compiled" not in name:
                raise
            # No compiler for C++ or Triton: this peer cannot run, the others can.
            rows.append({"peer": name, "unavailable": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
            del case.peers[name]
    case.check()
    for name, peer in case.timed().items():
        seconds = timer(peer)
        rate = case.floor / seconds
        rows.append(
            {
                "peer": name,
                "seconds": seconds,
                "host_seconds": timer.host(peer),
                "floor_bytes": case.floor,
                "bytes_per_second": rate,
                "of_copy": rate / bandwidth,
            }
        )
    ours = next(row["seconds"] for row in rows if row["peer"] == "fastunlearn")
    for row in rows:
        row.update(op=case.name, size=case.size)
        if "seconds" in row:
            row["times_ours"] = row["seconds"] / ours
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    start = f"{row['op']:<24} {row['size']:<10} {row['peer']:<15}"
    if "unavailable" in row:
        return f"{start} not here: {row['unavailable'][:80]}"
    return (
        f"{start} {row['seconds'] * 1e3:>9.3f} {row['host_seconds'] * 1e3:>9.3f} {row['bytes_per_second'] / 1e9:>8.1f} "
        f"{row['of_copy']:>7.0%} {row['times_ours']:>7.2f}"
    )


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(path: Path, report: dict[str, Any]) -> None:
    """Written beside and renamed: a crash leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)


def provenance(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What made a report, and on what."""
    return {
        "command": " ".join([f"python -m {module}", *arguments]),
        "commit": _commit(),
        "machine": platform.processor() or platform.machine(),
        "environment": describe().splitlines(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.bench.kernels", description=__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the large tensors (default: %(default)s)"
    )
    parser.add_argument("--op", choices=("velocity", "localization"), help="only these (default: both)")
    parser.add_argument(
        "--size",
        nargs="+",
        metavar="SIZE",
        help="small, real, synthetic (64 MiB to 4 GiB) or MiB (default: real and synthetic on a GPU, small on a CPU)",
    )
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of which the median (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it if asked to."""
    options = _parser().parse_args(arguments)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
        sizes = options.size or (["small"] if device.type == "cpu" else ["real", "synthetic"])
        cases = makers(sizes, getattr(torch, options.dtype), device)
    except (RuntimeError, AssertionError, ValueError) as error:
        sys.exit(f"fastunlearn.bench.kernels: {str(error).splitlines()[0]}")
    if options.runs < 1:
        sys.exit(f"fastunlearn.bench.kernels: --runs must be at least 1, got {options.runs}")
    timer = Timer(device, options.runs)
    bandwidth = copy_bandwidth(timer, 256 * MIB)
    print(f"{device}, {options.dtype}; a copy moves {bandwidth / 1e9:.1f} GB/s")
    print(f"fastunlearn runs on the backend {choose_backend('velocity_loss', device).name!r}")
    print(f"{'op':<24} {'size':<10} {'peer':<15} {'ms':>9} {'host ms':>9} {'GB/s':>8} {'of copy':>7} {'/ ours':>7}")
    rows = []
    for name, make in cases:
        if options.op is None or name.startswith(options.op):
            try:
                found = measure(make(), timer, bandwidth)
            except Disagreement as error:
                sys.exit(f"fastunlearn.bench.kernels: no speed of what disagrees: {error}")
            print(*map(line, found), sep="\n", flush=True)
            rows += found
    if options.output is not None:
        report = provenance("fastunlearn.bench.kernels", sys.argv[1:] if arguments is None else arguments) | {
            "dtype": options.dtype,
            "runs": options.runs,
            "copy_bytes_per_second": bandwidth,
            "rows": rows,
        }
        save(options.output, report)
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
