"""The cases of `cases.py` under pytest-benchmark: `pytest bench --benchmark-only --benchmark-autosave`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastunlearn.bench.cases import Case, case_makers
from fastunlearn.bench.meters import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAKERS = case_makers(["small" if DEVICE.type == "cpu" else "real"], torch.bfloat16, DEVICE)
PEERS = ("fastunlearn", "seed, eager", "seed, compiled")


@pytest.mark.parametrize(
    "make", [make for _, make in MAKERS], ids=[f"{i}-{name}" for i, (name, _) in enumerate(MAKERS)]
)
@pytest.mark.parametrize("peer", PEERS)
def test_forward_and_backward(benchmark: BenchmarkFixture, make: Callable[[], Case], peer: str) -> None:
    """Times one forward and backward pass. Inputs that fit into the cache stay there."""
    case = make()
    case.check()
    benchmark.group = f"{case.name}, {case.size}"
    benchmark.extra_info["floor_bytes"] = case.floor
    run = case.peers[peer]

    def run_to_the_end() -> None:
        run()
        synchronize(DEVICE)

    run_to_the_end()
    benchmark(run_to_the_end)
