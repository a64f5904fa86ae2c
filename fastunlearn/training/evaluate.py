"""Measures how well erasers work on prompts and seeds that they were not trained with.

No video has to be made or looked at. A teacher cache holds points on the frozen model's trajectories, with the
velocities with and without the concept; the model with erasers is run once at each point and compared with these.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.environment import PACKAGES, installed_version
from fastunlearn.files import writable, write_json
from fastunlearn.training import prepare
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import read_requests
from fastunlearn.training.evaluation.measure import measure
from fastunlearn.training.evaluation.report import draw, table
from fastunlearn.training.model import erased
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import EvaluateOptions, PrepareOptions


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates erasers: prints a table, and writes evaluation.json and evaluation.png.

    Returns:
        The content of evaluation.json.

    Raises:
        FileNotFoundError: there is no such pipeline, folder of erasers, cache or file of prompts.
        ValueError: the erasers or the cache are for another model, the cache is damaged or was begun with other
            options, or the erased model's velocity is not finite.
        OSError: a file cannot be written.
        MemoryError: memory ran out; the message says what would help.
    """
    output = writable(options.output_dir)
    erased.check_folders(options.erasers)
    model, cache = _model_and_cache(options)
    total = sum(map(len, cache.groups.values()))
    with explained_out_of_memory(options), tqdm(total=total, desc="evaluating", unit="point") as bar:
        measurement = measure(model, cache, options.batch_size, bar)
    report = _provenance(options, cache) | measurement.report()
    write_json(output / "evaluation.json", report)
    draw(report, output / "evaluation.png")
    print(table(report))
    print(f"\nwrote {output / 'evaluation.json'} and {output / 'evaluation.png'}")
    return report


def prepare_options(options: EvaluateOptions) -> PrepareOptions:
    """The options of `prepare` for the cache in `output_dir`: those with the same name as here, and defaults."""
    shared = {field.name for field in fields(PrepareOptions)} & {field.name for field in fields(EvaluateOptions)}
    chosen = {name: getattr(options, name) for name in shared}
    return PrepareOptions(**{**chosen, "output_dir": options.output_dir / "cache"})


def _model_and_cache(options: EvaluateOptions) -> tuple[VideoModel, TeacherCache]:
    """The model with its erasers, and the given cache or one sampled for this evaluation."""
    device, dtype = usable_device(options.device), model_dtype(options.mixed_precision)
    if options.cache_dir is not None:
        cache = TeacherCache.open(options.cache_dir)
        return erased.load_erased_model(options, dtype=dtype, device=device), cache
    preparing = prepare_options(options)
    requests = read_requests(preparing)
    encoded = prepare.encoded_prompts(preparing, requests, dtype, device)
    # Erasers that do not fit the model fail here, before hours of sampling.
    model = erased.load_erased_model(options, dtype=dtype, device=device)
    with prepare.progress_bar("sampling held-out trajectories") as progress:
        prepare.prepare(model, encoded, requests, preparing.output_dir, preparing, progress=progress)
    return model, TeacherCache.open(preparing.output_dir)


def _provenance(options: EvaluateOptions, cache: TeacherCache) -> dict[str, Any]:
    """What was evaluated, and how: the concept, model, erasers, cache, options and versions."""
    scales = options.eraser_scales or [1.0] * len(options.erasers)
    return {
        "concept": options.concept or cache.facts.get("concept"),
        "model": options.pretrained_model_name_or_path,
        "erasers": [
            {"folder": str(folder), "scale": scale} for folder, scale in zip(options.erasers, scales, strict=True)
        ],
        "cache": {"folder": str(cache.folder), "fingerprint": cache.fingerprint, "boundary": cache.facts["boundary"]},
        "options": {name: _as_json(value) for name, value in vars(options).items()},
        "versions": {package: version for package in PACKAGES if (version := installed_version(package)) is not None},
    }


def _as_json(value: Any) -> Any:
    """An option's value with lists for tuples and strings for paths."""
    if isinstance(value, tuple):
        return [_as_json(element) for element in value]
    return str(value) if isinstance(value, Path) else value
