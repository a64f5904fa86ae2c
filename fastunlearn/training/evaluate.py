"""Measures how well erasers work on prompts and seeds that they were not trained with.

A teacher cache holds points on the frozen model's trajectories, with the velocities with and without the concept; the
model with erasers is run once at each point and compared with these. Then it samples videos of the target prompts, and
the frozen model tells whether they show the concept. No video has to be decoded or looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.environment import PACKAGES, installed_version
from fastunlearn.files import read_json, subfolder, writable, write_json
from fastunlearn.training import prepare
from fastunlearn.training.cache.changes import changes
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import read_requests
from fastunlearn.training.evaluation.measure import measure
from fastunlearn.training.evaluation.report import draw, table
from fastunlearn.training.evaluation.seen import BASELINE, FROZEN, Sightings, look
from fastunlearn.training.loop import record
from fastunlearn.training.model import erased
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import EvaluateOptions, PrepareOptions

REPORT = "evaluation.json"
_LEAST_CONTRAST = 0.5  # between the shares of videos in which the concept is seen, with it in the prompt and without
_PLACES = ("erasers", "output_dir", "cache_dir", "target_prompts", "kept_prompts")  # options that only say where


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates erasers: prints a table, and writes evaluation.json and evaluation.png.

    Warns if the erasers were trained with some of the prompts or with the seed, as far as `train` recorded it.

    Returns:
        The content of evaluation.json.

    Raises:
        FileNotFoundError: there is no such pipeline, folder of erasers, cache or file of prompts.
        FileExistsError: the folder holds another evaluation, which is not to be overwritten.
        ValueError: the erasers or the cache are for another model, the cache is damaged or was begun with other
            options, or the erased model's velocity is not finite.
        OSError: a file cannot be written.
        MemoryError: memory ran out; the message says what would help.
    """
    output = writable(options.output_dir)
    erased.check_folders(options.erasers)
    _refuse_another_evaluation(output, options, {"options": _chosen(options)})  # before hours of sampling
    model, cache = _model_and_cache(options)
    provenance = _provenance(options, cache)
    _refuse_another_evaluation(output, options, provenance)
    total = sum(map(len, cache.groups.values()))
    with explained_out_of_memory(options), tqdm(total=total, desc="evaluating", unit="point") as bar:
        measurement = measure(model, cache, options.batch_size, bar)
    sightings = _look(model, cache, options)
    report = provenance | measurement.report() | {"seen": sightings.report()}
    write_json(output / REPORT, report)
    draw(report, output / "evaluation.png")
    print(table(report))
    print(f"\nwrote {output / REPORT} and {output / 'evaluation.png'}")
    return report


def prepare_options(options: EvaluateOptions) -> PrepareOptions:
    """The options of `prepare` for the cache in `output_dir`: those with the same name as here, and defaults.

    Its trajectories follow the target prompts, because they are the ones to be erased.
    """
    shared = {field.name for field in fields(PrepareOptions)} & {field.name for field in fields(EvaluateOptions)}
    chosen = {name: getattr(options, name) for name in shared}
    return PrepareOptions(**{**chosen, "output_dir": options.output_dir / "cache", "follow_replacement": 0.0})


def _model_and_cache(options: EvaluateOptions) -> tuple[VideoModel, TeacherCache]:
    """The model with its erasers, and the given cache or one sampled for this evaluation."""
    device, dtype = usable_device(options.device), model_dtype(options.mixed_precision)
    if options.cache_dir is not None:
        cache = TeacherCache.open(options.cache_dir)
        _warn_if_trained_with(options, cache.point_prompts(), cache.facts.get("seed"))
        return erased.load_erased_model(options, dtype=dtype, device=device), cache
    subfolder(options.output_dir, "cache")
    preparing = prepare_options(options)
    requests = read_requests(preparing)
    _warn_if_trained_with(options, [request.prompt for request in requests], options.seed)
    encoded = prepare.encoded_prompts(preparing, requests, dtype, device)
    # Erasers that do not fit the model fail here, before hours of sampling.
    model = erased.load_erased_model(options, dtype=dtype, device=device)
    with prepare.progress_bar("sampling held-out trajectories") as progress:
        prepare.prepare(model, encoded, requests, preparing.output_dir, preparing, progress=progress)
    return model, TeacherCache.open(preparing.output_dir)


def _look(model: VideoModel, cache: TeacherCache, options: EvaluateOptions) -> Sightings:
    """Looks for the concept in sampled videos. Warns if the frozen model cannot tell whether it is there."""
    if options.num_videos == 0:
        return Sightings()
    with explained_out_of_memory(options), tqdm(desc="looking for the concept", unit="video") as bar:
        sightings = look(model, cache, options.num_videos, options.batch_size, advance=bar.update)
    before, baseline = (sightings.share_seen(version) for version in (FROZEN, BASELINE))
    if before is not None and baseline is not None and before - baseline < _LEAST_CONTRAST:
        warnings.warn(
            f"num_videos: expected the concept to be seen in videos that the model without erasers makes of the target "
            f"prompts, and not in those of the prompts without it, got {before:.0%} and {baseline:.0%}; the share that "
            "is seen with the erasers tells little here",
            stacklevel=3,
        )
    return sightings


def _warn_if_trained_with(options: EvaluateOptions, prompts: Sequence[str], seed: Any) -> None:
    for folder in options.erasers:
        trained_from = record.read(folder)
        known = None if trained_from is None else record.not_held_out(trained_from, prompts, seed)
        if known is not None:
            warnings.warn(
                f"{folder}: expected held-out prompts and seed, got {known} that these erasers were trained with; the "
                "result does not tell how they work on others",
                stacklevel=4,
            )


def _refuse_another_evaluation(output: Path, options: EvaluateOptions, provenance: dict[str, Any]) -> None:
    """Raises FileExistsError if the folder holds an evaluation of something else, or none that can be read."""
    path = output / REPORT
    if options.overwrite_output_dir or not path.exists():
        return
    try:
        before = read_json(path)
    except ValueError:
        before = {}
    now = _identity(provenance)
    others = list(changes({name: _identity(before).get(name) for name in now}, now))
    if others:
        raise FileExistsError(
            f"{path}: expected this evaluation or none, got another one; choose another output_dir, or replace it with "
            f"overwrite_output_dir (there -> now): {'; '.join(others[:5])}"
        )


def _identity(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report must be the same for an evaluation to be the same one: all but where its files are."""
    erasers, cache, options = report.get("erasers"), report.get("cache"), report.get("options")
    identity: dict[str, Any] = {}
    if isinstance(erasers, list):
        entries = [entry for entry in erasers if isinstance(entry, dict)]
        identity["erasers"] = [{key: entry.get(key) for key in ("sha256", "scale")} for entry in entries]
    if isinstance(options, dict):
        identity["options"] = {name: value for name, value in options.items() if name not in _PLACES}
    if isinstance(cache, dict):
        identity["cache"] = cache.get("fingerprint")
    return identity


def _provenance(options: EvaluateOptions, cache: TeacherCache) -> dict[str, Any]:
    """What is evaluated, and how. The fingerprint of the cache covers the prompts, the seed and the model's weights."""
    scales = options.eraser_scales or [1.0] * len(options.erasers)
    return {
        "concept": options.concept or cache.facts.get("concept"),
        "model": options.pretrained_model_name_or_path,
        "erasers": [
            {"folder": str(folder), "scale": scale, "sha256": erased.erasers_digest(folder)}
            for folder, scale in zip(options.erasers, scales, strict=True)
        ],
        "cache": {"folder": str(cache.folder), "fingerprint": cache.fingerprint}
        | {name: cache.facts.get(name) for name in ("seed", "weights", "dtype", "boundary")},
        "options": _chosen(options),
        "versions": {package: version for package in PACKAGES if (version := installed_version(package)) is not None},
    }


def _chosen(options: EvaluateOptions) -> dict[str, Any]:
    return {name: _as_json(value) for name, value in vars(options).items() if name != "overwrite_output_dir"}


def _as_json(value: Any) -> Any:
    """An option's value with lists for tuples and strings for paths."""
    if isinstance(value, tuple):
        return [_as_json(element) for element in value]
    return str(value) if isinstance(value, Path) else value
