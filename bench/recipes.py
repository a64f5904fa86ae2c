"""Erases by several recipes, each with several seeds, on the little models of the demo, and has the videos judged.

It also compares the metrics of `fastunlearn evaluate` with the judge: a metric is as good as it ranks the runs.

    python -m fastunlearn.bench.recipes [--models FILE ...] [--rows NAME ...] [--seeds N ...] [--output FILE]

A row is the commands' defaults, or the paper's settings, with one thing changed; all share the settings of sampling
that the size of the models asks for. Every run is written to the output file when it is done, and not repeated if it
is there: after a change of the code, choose another file. `python -m fastunlearn.demo.pretrain --variant NAME` makes
further models.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from fastunlearn.bench.command import one_line_errors, option_parser, write_report
from fastunlearn.demo import prompts, report
from fastunlearn.demo.model import WEIGHTS, load
from fastunlearn.demo.videos import Generated, Studio, open_studio
from fastunlearn.demo.world import SHAPES
from fastunlearn.devices import usable_device
from fastunlearn.erasers import detach_erasers
from fastunlearn.files import expand_home, read_json, shown
from fastunlearn.training import evaluate, prepare, train
from fastunlearn.training.cache.index import file_entry
from fastunlearn.training.option_fields import is_seed
from fastunlearn.training.options import EvaluateOptions, PrepareOptions, TrainingOptions

COMMAND = "fastunlearn.bench.recipes"
CONCEPT = "circle"

# What the size of the models asks for, whatever the recipe.
_SIZE: dict[str, dict[str, Any]] = {
    "prepare": {"num_inference_steps": 12, "batch_size": 16},
    "train": {"checkpointing_steps": 10_000},
}
_PAPER: dict[str, dict[str, Any]] = {
    "prepare": {"baseline": "negative", "follow_replacement": 0.0},
    "train": {
        "relative": False,
        "negative_guidance_scale": 7.5,
        "preservation_weight": 0.5,
        "localization_weight": 1.0,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant_with_warmup",
        "kept_negative_share": 0.0,
    },
}


def _changed(start: Mapping[str, Mapping[str, Any]], **changes: Any) -> dict[str, dict[str, Any]]:
    """A row: `start` with these options of `prepare` or `train` changed."""
    preparing = {"baseline", "follow_replacement"}
    return {
        "prepare": dict(start.get("prepare", {})) | {k: v for k, v in changes.items() if k in preparing},
        "train": dict(start.get("train", {})) | {k: v for k, v in changes.items() if k not in preparing},
    }


# The name of a row -> its options that are not defaults.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {},
    "defaults, 120 steps of 8": _changed({}, max_train_steps=120, train_batch_size=8),
    "paper": _PAPER,
    "paper, relative": _changed(_PAPER, relative=True, learning_rate=0.1, localization_weight=0.1),
    "paper, learning rate 1e-3": _changed(_PAPER, learning_rate=1e-3),
    "paper, localization 0.004": _changed(_PAPER, localization_weight=0.004),
    "paper, from the replacement": _changed(_PAPER, baseline="replacement"),
    "defaults, absolute, learning rate 1e-4": _changed({}, relative=False, learning_rate=1e-4),
    "defaults, from the negative prompt": _changed({}, baseline="negative", follow_replacement=0.0),
    "defaults, eta 1": _changed({}, negative_guidance_scale=1.0),
    "defaults, eta 7.5": _changed({}, negative_guidance_scale=7.5),
    "defaults, constant learning rate": _changed({}, lr_scheduler="constant_with_warmup"),
    "defaults, points of the prompt only": _changed({}, follow_replacement=0.0),
    "defaults, localization 1": _changed({}, localization_weight=1.0),
    "defaults, no localization": _changed({}, localization_weight=0.0),
    "defaults, 150 steps": _changed({}, max_train_steps=150),
}
MAIN_ROWS = ("defaults", "defaults, 120 steps of 8", "paper")
_MEASURED = ("appearances", "together", "binding", "mask_iou")
_PARTS = {"model", "weights", "row", "seed", "options", "metrics", *_MEASURED}  # of a run in the output file


class _Results:
    """The results in the output file, also those of earlier calls.

    Raises:
        ValueError: the file holds something else, or runs of a row that had other options then.
    """

    def __init__(self, path: Path | None, arguments: Sequence[str] | None) -> None:
        self._path, self._arguments = path, arguments
        self.runs: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        runs = read_json(path).get("runs")
        if not isinstance(runs, list) or not all(isinstance(run, dict) and run.keys() >= _PARTS for run in runs):
            raise ValueError(f"--output: expected a new file or results of {COMMAND}, got another file, {path}")
        for run in runs:
            if [options for row, options in ROWS.items() if row == run["row"]] != [run["options"]]:
                raise ValueError(
                    f"--output: expected runs with the options of today's rows, got others for {shown(run['row'])} in "
                    f"{path}; choose another file"
                )
        self.runs = runs

    def has(self, **run: Any) -> bool:
        return any(all(done[name] == value for name, value in run.items()) for done in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        write_report(self._path, COMMAND, self._arguments, {"concept": CONCEPT, "runs": self.runs})


def _of_seed(model: Path, seed: int, rows: Sequence[str], results: _Results, device: torch.device) -> None:
    """Runs all rows for one model and seed. They share the videos before, and the caches of rows that prepare alike."""
    digest = file_entry(model)["sha256"][:12]
    missing = [row for row in rows if not results.has(model=model.stem, weights=digest, row=row, seed=seed)]
    if not missing:
        return
    studio = open_studio(CONCEPT, seed, device, model)
    with tempfile.TemporaryDirectory(prefix="fastunlearn-recipes-") as name:
        folder = Path(name)
        prompts.write_files(folder, CONCEPT)
        before: Generated | None = None
        for row in missing:
            options = _prepare_options(model, folder, seed, row, str(device))
            if before is None:
                before = studio.generate(options, "generating before", with_masks=True)
            erasers = _trained(options, folder, seed, row)
            measured = _measure(studio, erasers, options, before)
            measured["metrics"] = _metrics(options, erasers, folder, seed, row)
            run = {"model": model.stem, "weights": digest, "row": row, "seed": seed}
            results.add(run | {"options": ROWS[row]} | measured)
            print(_line(results.runs[-1:], f"{model.stem}, {row}, seed {seed}"), flush=True)


def _prepare_options(model: Path, folder: Path, seed: int, row: str, device: str) -> PrepareOptions:
    own = ROWS[row].get("prepare", {})
    first_alike = [options.get("prepare", {}) for options in ROWS.values()].index(own)
    return PrepareOptions(
        pretrained_model_name_or_path=str(model),
        output_dir=folder / f"cache-{first_alike}",
        concept=CONCEPT,
        target_prompts=folder / "target.txt",
        kept_prompts=folder / "kept.txt",
        mixed_precision="no",
        device=device,
        seed=seed,
        **_SIZE["prepare"] | own,
    )


def _trained(options: PrepareOptions, folder: Path, seed: int, row: str) -> Path:
    """Makes the row's cache, unless an earlier row has, and trains. Returns the folder of the erasers."""
    prepare.run(options)
    output = folder / f"trained-{list(ROWS).index(row)}"
    training = TrainingOptions(
        pretrained_model_name_or_path=options.pretrained_model_name_or_path,
        cache_dir=options.output_dir,
        output_dir=output,
        mixed_precision="no",
        device=options.device,
        seed=seed,
        **_SIZE["train"] | ROWS[row].get("train", {}),
    )
    return train.run(training).erasers


def _measure(studio: Studio, erasers: Path, options: PrepareOptions, before: Generated) -> dict[str, Any]:
    studio.model.load_erasers(erasers)
    try:
        after = studio.generate(options, "generating after", with_masks=False)
    finally:
        for expert in studio.model.experts:
            detach_erasers(expert)
    measured = report.measure(studio, CONCEPT, before, after)
    return {name: measured[name] for name in _MEASURED}


def _metrics(options: PrepareOptions, erasers: Path, folder: Path, seed: int, row: str) -> dict[str, float | None]:
    """What `evaluate` measures on held-out prompts. All rows share the cache of the first one."""
    target_file, kept_file = prompts.held_out_files(CONCEPT)
    cache = folder / "evaluation" / "cache"
    result = evaluate.run(
        EvaluateOptions(
            pretrained_model_name_or_path=options.pretrained_model_name_or_path,
            erasers=(erasers,),
            output_dir=folder / (f"evaluation-{list(ROWS).index(row)}" if cache.exists() else "evaluation"),
            concept=CONCEPT,
            target_prompts=folder / target_file,
            kept_prompts=folder / kept_file,
            cache_dir=cache if cache.exists() else None,
            num_inference_steps=options.num_inference_steps,
            batch_size=options.batch_size,
            mixed_precision="no",
            device=options.device,
            seed=(seed + 1000) % 2**32,
        )
    )
    seen = result["seen"]
    return {
        "erasure coefficient": result["erasure_coefficient"],
        "early erasure coefficient": result["early_erasure_coefficient"],
        "distance to the baseline": result["distance_to_baseline"],
        "coefficient on its own trajectories": seen["on_policy_coefficient"],
        "mean likeness": seen["mean_likeness"],
        "share of videos seen": seen["share"]["erased"],
        "drift at kept prompts": result["preserved_drift"],
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; values that are equal share their mean rank. NaN if one side is all equal."""
    if min(len(set(first)), len(set(second))) < 2:
        return math.nan

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def correlations(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How well each metric ranks the runs, as lines of text."""
    judged = [_shares(run)[CONCEPT][1] for run in runs]
    yield f"rank correlation of evaluate's metrics with the share of videos with a {CONCEPT}, over {len(runs)} runs"
    for name in runs[0]["metrics"]:
        known = [(run["metrics"][name], seen) for run, seen in zip(runs, judged, strict=True)]
        pairs = [(value, seen) for value, seen in known if value is not None]
        yield f"{name:<40}{rank_correlation(*zip(*pairs, strict=True)) if pairs else math.nan:>20.2f}"


def _quoted(rows: Iterable[str]) -> str:
    return ", ".join(f'"{row}"' for row in rows)  # there are commas in their names


def _shares(run: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The columns of the table for one run: what was before, and after; the worst of the other shapes."""
    was, now = (run["appearances"][when] for when in report.WHEN)
    others = [shape for shape in SHAPES if shape != CONCEPT]

    def column(shapes: Iterable[str], name: str, worst: Any) -> tuple[float, float]:
        return worst(was[shape][name]["share"] for shape in shapes), worst(
            now[shape][name]["share"] for shape in shapes
        )

    return {
        CONCEPT: column([CONCEPT], "asked", max),
        "others beside it": column(others, "beside", min),
        "others": column(others, "asked", min),
        "uninvited": column(others, "uninvited", max),
        "asked-for colour": column(SHAPES, "colour", min),
    }


def _line(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    columns = [[_shares(run)[head] for run in runs] for head in _shares(runs[0])]
    cells = [
        f"{mean(was for was, _ in column):.0%} -> {mean(now for _, now in column):.0%}".rjust(20) for column in columns
    ]
    return f"{name:<40}" + "".join(cells)


def table(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The means over seeds of each model and row, as lines of text."""
    for model, weights in dict.fromkeys((run["model"], run["weights"]) for run in runs):
        of_model = [run for run in runs if (run["model"], run["weights"]) == (model, weights)]
        seeds = sorted({run["seed"] for run in of_model})
        yield (
            f"{model}, SHA-256 {weights}...: share of videos before -> after, means over seeds; of several shapes, the "
            "worst one"
        )
        yield " " * 40 + "".join(f"{head:>20}" for head in _shares(of_model[0]))
        for row in ROWS:
            if of_row := [run for run in of_model if run["row"] == row]:
                yield _line(
                    of_row, row + ("" if len(of_row) == len(seeds) else f" ({len(of_row)} of {len(seeds)} seeds)")
                )
        yield ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, does the runs that are missing, and prints the table of all."""
    parser: argparse.ArgumentParser = option_parser(COMMAND, __doc__.partition("\n")[0])
    parser.add_argument(
        "--models",
        type=expand_home,
        nargs="+",
        default=[WEIGHTS],
        metavar="FILE",
        help="models to erase from, as python -m fastunlearn.demo.pretrain writes them (default: the demo's)",
    )
    parser.add_argument(
        "--rows",
        choices=ROWS,
        nargs="+",
        default=MAIN_ROWS,
        metavar="NAME",
        help=f"rows of the table: {_quoted(ROWS)} (default: {_quoted(MAIN_ROWS)})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds of the caches, of training and of the judged videos (default: 0 1 2)",
    )
    options = parser.parse_args(arguments)
    with one_line_errors(COMMAND, ValueError, OSError, MemoryError):
        for seed in options.seeds:
            is_seed("--seeds", seed)
        device = usable_device(options.device)
        for model in options.models:
            load(model)  # raises before the runs of the others, which take hours
        results = _Results(options.output, arguments)
        for model in options.models:
            for seed in options.seeds:
                _of_seed(model, seed, options.rows, results, device)
    print("\n".join([*table(results.runs), *correlations(results.runs)]))


if __name__ == "__main__":
    main()
