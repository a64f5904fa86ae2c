"""Measures a whole training step of ours against a published T2VUnlearning-style one: passes, time and memory.

Before anything is timed, the losses and gradients of both are compared, always at the size `tiny`. Each measured call
builds its model, takes a first step, and measures the steps that follow; the peers take turns. The cost of the teacher
cache is shown apart, and then divided over the default number of training steps.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastunlearn.bench.cogvideox import SIZES
from fastunlearn.bench.command import check_counts, one_line_errors, option_parser, write_report
from fastunlearn.bench.meters import MIB, Meter, measurable_device
from fastunlearn.bench.step_costs import (
    DEFAULT_STEPS,
    DEFAULT_TRAJECTORIES,
    OURS,
    PUBLISHED,
    CacheCost,
    Row,
    aims,
    measure,
    measure_cache,
    with_cache,
)
from fastunlearn.bench.steps import StepCost, StepRunner, check
from fastunlearn.dtypes import dtype_name
from fastunlearn.training.cache.reader import TeacherCache

COMMAND = "fastunlearn.bench.training"


def print_cache(cache: CacheCost) -> None:
    """Prints the cost of the teacher cache, in total and per training step."""
    print(
        f"the teacher cache, once: {DEFAULT_TRAJECTORIES} trajectories, {cache.passes:.0f} passes, "
        f"{cache.seconds:.0f} s, peak {cache.peak_bytes / MIB:.0f} MiB, {cache.disk_bytes / MIB:.0f} MiB on disk\n"
        f"(in proportion to the {cache.sampled} trajectories sampled here); over {DEFAULT_STEPS} steps that is "
        f"{cache.passes / DEFAULT_STEPS:.1f} passes and {cache.seconds / DEFAULT_STEPS:.3f} s per step",
        flush=True,
    )


def print_tables(rows: Sequence[Row], compared: Sequence[Mapping[str, Any]]) -> None:
    """Prints the costs per step, without the cache and with the step's share of it, and which goals are reached."""
    print(f"\n{'per step':<46} {'passes':>7} {'s':>9} {'peak MiB':>9}")
    for row in rows:
        if row.ran_out is not None:
            print(f"{row.peer:<46} out of memory during {row.ran_out}")
        else:
            print(f"{row.peer:<46} {row.passes:>7.1f} {row.seconds:>9.3f} {row.peak_bytes / MIB:>9.0f}")
    print(f"\n{'':<74} {'times less than':>22} {'of their':>9}")
    print(
        f"{'per step, with its share of the cache':<46} {'passes':>7} {'s':>9} {'peak MiB':>9} "
        f"{'random step':>13} {'the end':>8} {'memory':>9}"
    )
    for entry in compared:
        print(
            f"{entry['peer']:<46} {entry['passes']:>7.1f} {entry['seconds']:>9.3f} {entry['peak_bytes'] / MIB:>9.0f} "
            f"{_ratio(entry['times_less_than_to_a_random_step'], 1):>13} "
            f"{_ratio(entry['times_less_than_to_the_end'], 1):>8} {_ratio(entry['of_the_memory'], 2):>9}"
        )
    print()
    for result in aims(compared):
        reached, missed = result["reached_by"], result["missed_by"]
        if reached and missed:
            print(f"{result['aim']}: reached by {'; '.join(reached)}. Missed by {'; '.join(missed)}")
        else:
            print(f"{result['aim']}: reached by {'all' if reached else 'none'}")


def _ratio(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _peers(runner: StepRunner, cache: TeacherCache, calls: int) -> dict[str, Callable[[int], StepCost]]:
    """Every peer as a function of the number of the call."""
    peers: dict[str, Callable[[int], StepCost]] = {}
    for name, options in PUBLISHED.items():
        peers[name] = functools.partial(runner.run_published, calls=calls, **options)
    for name, options in OURS.items():
        peers[name] = functools.partial(_run_ours, runner, cache, options)
    return peers


def _run_ours(runner: StepRunner, cache: TeacherCache, options: Mapping[str, bool], call: int) -> StepCost:
    return runner.run_ours(cache, **options)


def _measure(runner: StepRunner, trajectories: int, meter: Meter) -> tuple[list[Row], CacheCost]:
    """Makes a teacher cache, prints its cost, and measures every peer."""
    with tempfile.TemporaryDirectory() as folder:
        with one_line_errors(f"{COMMAND}: cannot make a cache to train from", MemoryError):
            cost = measure_cache(runner, Path(folder), trajectories, meter)
        print_cache(cost)
        return measure(_peers(runner, TeacherCache.open(folder), meter.runs), meter), cost


def _parser() -> argparse.ArgumentParser:
    parser = option_parser(COMMAND, __doc__)
    parser.add_argument(
        "--model", choices=SIZES, default="tiny", help="measure a model of this size (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        metavar="N",
        help="call every peer N times and report the mean; a call measures one published step or three of ours "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sampling-steps",
        type=int,
        default=50,
        metavar="N",
        help="number of steps in a sampled trajectory (default: %(default)s)",
    )
    parser.add_argument(
        "--trajectories",
        type=int,
        default=2,
        metavar="N",
        help="sample N trajectories for the target prompt and N for the kept one to measure the cache "
        "(default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes them if asked to."""
    options = _parser().parse_args(arguments)
    with one_line_errors(COMMAND, ValueError):
        check_counts(options, steps=1, sampling_steps=2, trajectories=1)
        device = measurable_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = SIZES[options.model]
    print(
        f"{options.model}: {size.layers} layers, {size.heads} heads x {size.channels}, "
        f"{size.tokens} + {size.text_tokens} tokens, erasers of rank {size.rank}; "
        f"{dtype_name(dtype)} on {device}, {torch.get_num_threads()} threads",
        flush=True,
    )
    with one_line_errors(COMMAND):
        difference = check(StepRunner(SIZES["tiny"], device, dtype, sampling_steps=4))
    print(f"losses, gradients and attention maps agree: relative differences up to {difference:.1e}", flush=True)
    runner = StepRunner(size, device, dtype, options.sampling_steps)
    rows, cost = _measure(runner, options.trajectories, Meter(device, options.steps))
    compared = with_cache(rows, cost)
    print_tables(rows, compared)
    results: dict[str, Any] = {
        "model": {"name": options.model, **asdict(size), "dtype": dtype_name(dtype)},
        "calls": options.steps,
        "sampling_steps": options.sampling_steps,
        "largest_relative_difference": difference,
        "step": [asdict(row) for row in rows],
        "cache": asdict(cost) | {"trajectories": DEFAULT_TRAJECTORIES, "training_steps": DEFAULT_STEPS},
        "step_with_its_share_of_the_cache": compared,
        "aims": aims(compared),
    }
    write_report(options.output, COMMAND, arguments, results)


if __name__ == "__main__":
    main()
