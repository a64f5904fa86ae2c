"""Measures what training steps cost, and compares ours with the published ones."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastunlearn.bench.meters import Meter
from fastunlearn.bench.steps import RanOut, StepCost, StepRunner
from fastunlearn.training.options import PrepareOptions, TrainingOptions

# Options of `StepRunner.run_published`, by the peer's name.
TO_A_RANDOM_STEP, TO_THE_END = "published, sampled to a random step", "published, sampled to the end"
PUBLISHED: dict[str, dict[str, bool]] = {
    TO_A_RANDOM_STEP: {},
    TO_THE_END: {"to_the_end": True},
    "published, to a random step, checkpointing": {"checkpointing": True},
}
# Options of `StepRunner.run_ours`, by the peer's name.
OURS: dict[str, dict[str, bool]] = {
    "fastunlearn": {},
    "fastunlearn, sequential terms": {"sequential_terms": True},
    "fastunlearn, checkpointing": {"gradient_checkpointing": True},
    "fastunlearn, sequential terms, checkpointing": {"sequential_terms": True, "gradient_checkpointing": True},
    "fastunlearn, dense localization": {"low_rank": False},
    "fastunlearn, dense localization, checkpointing": {"low_rank": False, "gradient_checkpointing": True},
}
DEFAULT_STEPS, DEFAULT_TRAJECTORIES = TrainingOptions.max_train_steps, 2 * PrepareOptions.num_trajectories


class Aim(NamedTuple):
    """A goal for one entry of a comparison.

    Attributes:
        key: the entry's key.
        least: the smallest value that reaches the goal, or None.
        most: the largest value that reaches the goal, or None.
        text: the goal in words.
    """

    key: str
    least: float | None
    most: float | None
    text: str

    def is_reached(self, value: float) -> bool:
        """Whether `value` reaches the goal."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


AIMS = (
    Aim("times_less_than_to_a_random_step", 5.0, None, "5 times less time than sampling to a random step"),
    Aim("times_less_than_to_the_end", 5.0, None, "5 times less time than sampling to the end"),
    Aim("of_the_memory", None, 0.5, "half the memory"),
)


@dataclass(frozen=True)
class Row:
    """The cost of a peer's step.

    Attributes:
        peer: the peer's name.
        passes: samples through a transformer per step, averaged over the calls.
        seconds: time per step, averaged over the calls.
        peak_bytes: the largest peak of all calls.
        ran_out: the phase in which it ran out of memory, or None. If it did, nothing else is known.
    """

    peer: str
    passes: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    ran_out: str | None = None


@dataclass(frozen=True)
class CacheCost:
    """The cost of a teacher cache with the default number of trajectories, in proportion to those sampled here.

    Attributes:
        sampled: trajectories that were sampled.
        passes: samples through the transformer, for the default number of trajectories.
        seconds: time, for the default number of trajectories.
        peak_bytes: peak memory of sampling.
        disk_bytes: size on disk, for the default number of trajectories.
    """

    sampled: int
    passes: float
    seconds: float
    peak_bytes: int
    disk_bytes: float


def measure(peers: Mapping[str, Callable[[int], StepCost]], meter: Meter) -> list[Row]:
    """Calls every peer `meter.runs` times, all taking turns.

    Args:
        peers: by name, functions that take the number of the call, counted from 0.
        meter: measures memory, and says how many calls there are.

    Returns:
        One row per peer.
    """
    costs: dict[str, list[StepCost]] = {name: [] for name in peers}
    peaks = dict.fromkeys(peers, 0)
    ran_out: dict[str, str] = {}
    for call in range(meter.runs):
        for name, peer in peers.items():
            if name in ran_out:
                continue
            try:
                peak = meter.peak_bytes(lambda: costs[name].append(peer(call)))  # noqa: B023
                peaks[name] = max(peaks[name], peak)
            except RanOut as error:
                ran_out[name] = str(error)
            if meter.device.type == "cuda":  # on a CPU the meter frees memory itself
                gc.collect()
                torch.cuda.empty_cache()
    return [
        Row(name, ran_out=ran_out[name])
        if name in ran_out
        else Row(
            name,
            statistics.mean(cost.passes for cost in peer_costs),
            statistics.mean(cost.seconds for cost in peer_costs),
            peaks[name],
        )
        for name, peer_costs in costs.items()
    ]


def measure_cache(runner: StepRunner, folder: Path, trajectories: int, meter: Meter) -> CacheCost:
    """Makes a teacher cache in `folder` and measures it.

    Args:
        runner: makes the cache.
        folder: where to make it.
        trajectories: the number to sample for the target prompt, and as many for the kept one.
        meter: measures memory.
    """
    costs: list[StepCost] = []
    peak = meter.peak_bytes(lambda: costs.append(runner.make_cache(folder, trajectories)))
    disk_bytes = sum(file.stat().st_size for file in folder.glob("shard-*"))
    passes, seconds = (DEFAULT_TRAJECTORIES * each for each in costs[0])
    proportion = DEFAULT_TRAJECTORIES / (2 * trajectories)
    return CacheCost(2 * trajectories, passes, seconds, peak, proportion * disk_bytes)


def with_cache(rows: Sequence[Row], cache: CacheCost) -> list[dict[str, Any]]:
    """Our rows, with each step's share of the cache added, compared with the published rows.

    A comparison is None where the published step ran out of memory. Memory is compared with sampling to a random step.
    """
    published = {row.peer: row for row in rows if row.ran_out is None}
    to_a_random_step, to_the_end = published.get(TO_A_RANDOM_STEP), published.get(TO_THE_END)
    compared = []
    for row in rows:
        if row.peer not in OURS or row.ran_out is not None:
            continue
        seconds = row.seconds + cache.seconds / DEFAULT_STEPS
        peak = max(row.peak_bytes, cache.peak_bytes)
        compared.append(
            {
                "peer": row.peer,
                "passes": row.passes + cache.passes / DEFAULT_STEPS,
                "seconds": seconds,
                "peak_bytes": peak,
                "times_less_than_to_a_random_step": to_a_random_step and to_a_random_step.seconds / seconds,
                "times_less_than_to_the_end": to_the_end and to_the_end.seconds / seconds,
                "of_the_memory": to_a_random_step and peak / to_a_random_step.peak_bytes,
            }
        )
    return compared


def aims(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which of our rows reach each goal, and which miss it. A goal is left out if nothing can be compared for it."""
    results = []
    for aim in AIMS:
        values = {entry["peer"]: entry[aim.key] for entry in compared if entry[aim.key] is not None}
        reached = [peer for peer, value in values.items() if aim.is_reached(value)]
        missed = [peer for peer in values if peer not in reached]
        if values:
            results.append({"aim": aim.text, "reached_by": reached, "missed_by": missed})
    return results
