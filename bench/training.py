"""A training step against the one that T2VUnlearning-style loops publish: `python -m fastunlearn.bench.training`.

Theirs is in `published.py`. Ours is `fastunlearn.training`'s own, with the teacher cache's cost shown apart, and
divided over the default number of steps. The losses and gradients of both are compared before anything is timed, at
the size `tiny`. Every call of a peer builds its model, does a first step, and measures those that follow; calls are
taken in turn.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fastunlearn.bench.algorithms import Meter
from fastunlearn.bench.cases import MIB, Disagreement
from fastunlearn.bench.kernels import provenance, save
from fastunlearn.bench.steps import SIZES, Bench, RanOut, Sample, check
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.options import PrepareOptions, TrainingOptions

TO_A_RANDOM_STEP, TO_THE_END = "published, sampled to a random step", "published, sampled to the end"
PUBLISHED: dict[str, dict[str, bool]] = {
    TO_A_RANDOM_STEP: {},
    TO_THE_END: {"to_the_end": True},
    "published, to a random step, checkpointing": {"checkpointing": True},
}
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
    """What a comparison's entry `key` is to be: at least so much, or at most.

    `text` says it to who reads the table.
    """

    key: str
    least: float | None
    most: float | None
    text: str

    def is_reached(self, value: float) -> bool:
        """Whether `value` is enough, or little enough."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


AIMS = (
    Aim("times_less_than_to_a_random_step", 5.0, None, "5 times less time than sampling to a random step"),
    Aim("times_less_than_to_the_end", 5.0, None, "5 times less time than sampling to the end"),
    Aim("of_the_memory", None, 0.5, "half the memory"),
)


@dataclass(frozen=True)
class Row:
    """A peer's step: means of its calls, and the largest peak. With nothing else, at what it ran out of memory."""

    peer: str
    passes: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    ran_out: str | None = None


@dataclass(frozen=True)
class CacheCost:
    """Of a teacher cache of the default number of trajectories, from those that were sampled here.

    Attributes:
        sampled: trajectories.
        passes: of all the default ones.
        seconds: the same.
        peak_bytes: of sampling.
        disk_bytes: of all the default ones' points.
    """

    sampled: int
    passes: float
    seconds: float
    peak_bytes: int
    disk_bytes: float


def measure(peers: Mapping[str, Callable[[int], Sample]], meter: Meter) -> list[Row]:
    """Calls every peer `meter.runs` times with the number of the call, all in turn; a row each."""
    found: dict[str, list[Sample]] = {name: [] for name in peers}
    peaks = dict.fromkeys(peers, 0)
    ran_out: dict[str, str] = {}
    for call in range(meter.runs):
        for name, peer in peers.items():
            if name in ran_out:
                continue
            try:
                peak = meter.peak_bytes(lambda: found[name].append(peer(call)))  # noqa: B023
                peaks[name] = max(peaks[name], peak)
            except RanOut as error:
                ran_out[name] = str(error)
            if meter.device.type == "cuda":  # the meter itself sees to a CPU's memory
                gc.collect()
                torch.cuda.empty_cache()
    return [
        Row(name, ran_out=ran_out[name])
        if name in ran_out
        else Row(
            name,
            statistics.mean(sample.passes for sample in samples),
            statistics.mean(sample.seconds for sample in samples),
            peaks[name],
        )
        for name, samples in found.items()
    ]


def measure_cache(bench: Bench, folder: Path, trajectories: int, meter: Meter) -> CacheCost:
    """Makes a cache in `folder`; what the default number of trajectories would cost in proportion."""
    found: list[Sample] = []
    peak = meter.peak_bytes(lambda: found.append(bench.make_cache(folder, trajectories)))
    times = DEFAULT_TRAJECTORIES / (2 * trajectories)
    disk = sum(file.stat().st_size for file in folder.glob("shard-*"))
    passes, seconds = (DEFAULT_TRAJECTORIES * each for each in found[0])
    return CacheCost(2 * trajectories, passes, seconds, peak, times * disk)


def with_cache(rows: Sequence[Row], cache: CacheCost) -> list[dict[str, Any]]:
    """Our rows with the cache's share of a step, and how they compare with the published ones; None where they cannot.

    Their memory is that of sampling to a random step.
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
    """Which of our rows reach each aim, and which miss it. Aims that nothing can be compared for are left out."""
    found = []
    for aim in AIMS:
        values = {entry["peer"]: entry[aim.key] for entry in compared if entry[aim.key] is not None}
        reached = [peer for peer, value in values.items() if aim.is_reached(value)]
        missed = [peer for peer in values if peer not in reached]
        if values:
            found.append({"aim": aim.text, "reached_by": reached, "missed_by": missed})
    return found


def print_cache(cache: CacheCost) -> None:
    """Prints what the cache costs, in all and a step."""
    print(
        f"the teacher cache, once: {DEFAULT_TRAJECTORIES} trajectories, {cache.passes:.0f} passes, "
        f"{cache.seconds:.0f} s, peak {cache.peak_bytes / MIB:.0f} MiB, {cache.disk_bytes / MIB:.0f} MiB on disk\n"
        f"({cache.sampled} were sampled, the rest is in proportion); over {DEFAULT_STEPS} steps "
        f"{cache.passes / DEFAULT_STEPS:.1f} passes and {cache.seconds / DEFAULT_STEPS:.3f} s a step",
        flush=True,
    )


def print_tables(rows: Sequence[Row], compared: Sequence[Mapping[str, Any]]) -> None:
    """Prints a step's costs, without the cache and with its share, and which aims are reached."""
    print(f"\n{'a step':<46} {'passes':>7} {'s':>9} {'peak MiB':>9}")
    for row in rows:
        if row.ran_out is not None:
            print(f"{row.peer:<46} out of memory at {row.ran_out}")
        else:
            print(f"{row.peer:<46} {row.passes:>7.1f} {row.seconds:>9.3f} {row.peak_bytes / MIB:>9.0f}")
    print(f"\n{'':<74} {'times less than':>22} {'of their':>9}")
    print(
        f"{'a step and its share of the cache':<46} {'passes':>7} {'s':>9} {'peak MiB':>9} "
        f"{'random step':>13} {'the end':>8} {'memory':>9}"
    )
    for entry in compared:
        print(
            f"{entry['peer']:<46} {entry['passes']:>7.1f} {entry['seconds']:>9.3f} {entry['peak_bytes'] / MIB:>9.0f} "
            f"{_ratio(entry['times_less_than_to_a_random_step'], 1):>13} "
            f"{_ratio(entry['times_less_than_to_the_end'], 1):>8} {_ratio(entry['of_the_memory'], 2):>9}"
        )
    print()
    for found in aims(compared):
        reached, missed = found["reached_by"], found["missed_by"]
        if reached and missed:
            print(f"{found['aim']}: reached by {'; '.join(reached)}. Missed by {'; '.join(missed)}")
        else:
            print(f"{found['aim']}: reached by {'all' if reached else 'none'}")


def _ratio(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastunlearn.bench.training", description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="tiny", help="whose size (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        metavar="N",
        help="calls of every peer, of which the mean: of a published step, or three of ours (default: %(default)s)",
    )
    parser.add_argument(
        "--sampling-steps", type=int, default=50, metavar="N", help="of a trajectory (default: %(default)s)"
    )
    parser.add_argument(
        "--trajectories",
        type=int,
        default=2,
        metavar="N",
        help="to measure the cache by, for the target and for what is kept (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON")
    return parser


def _fail(message: object) -> NoReturn:
    sys.exit(f"fastunlearn.bench.training: {message}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them if asked to."""
    options = _parser().parse_args(arguments)
    for name, least in (("steps", 1), ("sampling_steps", 2), ("trajectories", 1)):
        if getattr(options, name) < least:
            _fail(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        _fail(str(error).splitlines()[0])
    if device.type not in ("cpu", "cuda"):
        _fail(f"--device must be a CPU or a CUDA GPU, got {device}")
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        _fail("a process's peaks of memory are known on Linux alone")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = SIZES[options.model]
    meter = Meter(device, options.steps)
    kind = str(dtype).removeprefix("torch.")
    print(
        f"{options.model}: {size.layers} layers, {size.heads} heads x {size.channels}, "
        f"{size.tokens} + {size.text_tokens} tokens, erasers of rank {size.rank}; "
        f"{kind} on {device}, {torch.get_num_threads()} threads",
        flush=True,
    )
    try:
        worst = check(Bench(SIZES["tiny"], device, dtype, sampling_steps=4))
    except Disagreement as error:
        _fail(f"no speed of what disagrees: {error}")
    print(f"losses, gradients and attention maps of both agree: relative differences up to {worst:.1e}", flush=True)
    bench = Bench(size, device, dtype, options.sampling_steps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            cost = measure_cache(bench, Path(folder), options.trajectories, meter)
        except MemoryError as error:
            _fail(f"there is no cache to train from: {error}")
        print_cache(cost)
        cache = TeacherCache.open(folder)
        peers: dict[str, Callable[[int], Sample]] = {}
        for name, published in PUBLISHED.items():
            peers[name] = functools.partial(bench.published, calls=options.steps, **published)
        for name, ours in OURS.items():
            peers[name] = functools.partial(_ours, bench, cache, ours)
        rows = measure(peers, meter)
    compared = with_cache(rows, cost)
    print_tables(rows, compared)
    if options.output is not None:
        report = provenance("fastunlearn.bench.training", sys.argv[1:] if arguments is None else arguments) | {
            "model": {"name": options.model, **asdict(size), "dtype": kind},
            "calls": options.steps,
            "sampling_steps": options.sampling_steps,
            "largest_relative_difference": worst,
            "step": [asdict(row) for row in rows],
            "cache": asdict(cost) | {"trajectories": DEFAULT_TRAJECTORIES, "training_steps": DEFAULT_STEPS},
            "step_with_its_share_of_the_cache": compared,
            "aims": aims(compared),
        }
        save(options.output, report)
        print(f"wrote {options.output}")


def _ours(bench: Bench, cache: TeacherCache, options: Mapping[str, bool], call: int) -> Sample:
    return bench.ours(cache, **options)


if __name__ == "__main__":
    main()
