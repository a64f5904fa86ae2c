"""The same cases under pytest-benchmark: `pytest bench --benchmark-only --benchmark-autosave`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastunlearn.bench.cases import Case, makers

ON_GPU = torch.cuda.is_available()
CASES = makers(["real"] if ON_GPU else ["small"], torch.bfloat16, "cuda" if ON_GPU else "cpu")
PEERS = ("fastunlearn", "seed, eager", "seed, compiled")


@pytest.mark.parametrize("make", [make for _, make in CASES], ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
@pytest.mark.parametrize("peer", PEERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, make: Callable[[], Case], peer: str) -> None:
    """One forward and backward pass, on inputs that are in the cache if they fit."""
    case = make()
    case.check()
    benchmark.group = f"{case.name}, {case.size}"
    benchmark.extra_info["floor_bytes"] = case.floor
    run = case.peers[peer]

    def once() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    once()
    benchmark(once)
