"""How time and memory are measured on a device."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastunlearn.devices import usable_device

MIB = 2**20
# More than any GPU's L2 cache holds.
FLUSH_BYTES = 512 * MIB


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work. A CPU has no work outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measurable_device(name: str) -> torch.device:
    """The device called `name`, if time and peak memory can be measured on it.

    Raises:
        ValueError: there is no such device, or its peak memory is unknown.
    """
    device = usable_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected a CPU or a CUDA GPU, got {device}")
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError(f"--device: expected a CUDA GPU or Linux, to measure peak memory, got a CPU on {sys.platform}")
    return device


class Timer:
    """Median time of a call whose inputs are not in a GPU's L2 cache.

    Args:
        device: the device that the calls run on.
        runs: the number of measured calls.
    """

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any]) -> float:
        """Seconds per call. Three calls before the measured ones compile and warm up."""
        for _ in range(3):
            function()
        return statistics.median(self._time_once(function) for _ in range(self.runs))

    def host_seconds(self, function: Callable[[], Any]) -> float:
        """Seconds until a call returns, whether or not the device has finished."""
        times = []
        for _ in range(self.runs):
            synchronize(self.device)
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        synchronize(self.device)
        return statistics.median(times)

    def _time_once(self, function: Callable[[], Any]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self._flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def copy_bandwidth(timer: Timer, nbytes: int) -> float:
    """Bytes read and written per second when the device copies `nbytes`."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * nbytes / timer(lambda: target.copy_(source))


class Cost(NamedTuple):
    """What a call costs: its median time, and its peak memory above what was held before."""

    seconds: float
    peak_bytes: int


class Meter:
    """Median time and peak memory of several peers' calls.

    Args:
        device: a device that `measurable_device` returned.
        runs: the number of measured calls of each peer.
    """

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs

    def costs(self, peers: Mapping[str, Callable[[], Any]]) -> dict[str, Cost]:
        """Every peer's median time and peak memory."""
        seconds = self.seconds(peers)
        return {name: Cost(seconds[name], self.peak_bytes(function)) for name, function in peers.items()}

    def seconds(self, peers: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Every peer's median time. The peers take turns, so that other load on the machine affects all of them."""
        times: dict[str, list[float]] = {name: [] for name in peers}
        for run in range(self.runs + 1):
            for name, function in peers.items():
                synchronize(self.device)
                start = time.perf_counter()
                function()
                synchronize(self.device)
                if run:  # the first run is a warm-up
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(peer_times) for name, peer_times in times.items()}

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """The most memory that a call holds at once, above what was held before it."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            function()
            return torch.cuda.max_memory_allocated(self.device) - before
        # On a CPU: the process's resident memory, once freed memory has gone back to Linux. Writing 5 resets Linux's
        # record of the peak.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory_status("VmRSS")
        function()
        return _memory_status("VmHWM") - before


def _memory_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
