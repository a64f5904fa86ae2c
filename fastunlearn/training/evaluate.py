"""How erasers do on prompts and seeds that they were not trained with, in velocity space.

No video is made and nobody has to look: the frozen model's own trajectories, in a teacher cache, say at which points it
would draw the concept and in which direction; the model with erasers is asked once at each.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.environment import PACKAGES, installed_version
from fastunlearn.files import writable, write_json
from fastunlearn.training import prepare
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import requests_of
from fastunlearn.training.evaluation.measure import measure
from fastunlearn.training.evaluation.report import draw, table
from fastunlearn.training.model import erased
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.options import EvaluateOptions, PrepareOptions

KEPT = "kept"  # the group of what is to stay; every other group is one of targets

# The frozen model asked again differs from its cache by rounding: by 1 or 2 percent in half precision on another GPU.
_MOST_FROZEN_DRIFT = 0.1


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluates, prints a table, writes evaluation.json and evaluation.png, and returns what the former holds.

    Raises:
        FileNotFoundError: there is no such pipeline, folder of erasers, cache or file of prompts.
        ValueError: the erasers or the cache are not for this model, the cache is damaged or was begun with other
            options, or the erased model's velocity is not finite.
        OSError: something cannot be written.
    """
    output = writable(options.output_dir)
    erased.check_folders(options.erasers)
    device, dtype = usable_device(options.device), model_dtype(options.mixed_precision)
    load = partial(erased.load_erased_model, options, dtype=dtype, device=device)
    if options.cache_dir is not None:
        cache, model = TeacherCache.open(options.cache_dir), load()
    else:
        asked = prepare_options(options)
        requests = requests_of(asked)
        encoded = prepare.encoded_prompts(asked, requests, dtype, device)
        model = load()  # before hours of sampling, if the erasers do not fit
        with tqdm(desc="sampling held-out trajectories", unit="batch") as bar:
            prepare.prepare(model, encoded, requests, asked.output_dir, asked, progress=partial(_advance, bar))
        cache = TeacherCache.open(asked.output_dir)
    points = sum(map(len, cache.groups.values()))
    with explained_out_of_memory(options), tqdm(total=points, desc="evaluating", unit="point") as bar:
        measurement = measure(model, cache, options.batch_size, bar)
    report = _facts(options, cache) | measurement.report()
    write_json(output / "evaluation.json", report)
    draw(report, output / "evaluation.png")
    print(table(report))
    print(f"\nwrote {output / 'evaluation.json'} and {output / 'evaluation.png'}")
    return report


def prepare_options(options: EvaluateOptions) -> PrepareOptions:
    """Those of `prepare` for the cache in `output_dir`: of the same names, the rest by default."""
    shared = {field.name for field in fields(PrepareOptions)} & {field.name for field in fields(EvaluateOptions)}
    chosen = {name: getattr(options, name) for name in shared}
    return PrepareOptions(**{**chosen, "output_dir": options.output_dir / "cache"})


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _facts(options: EvaluateOptions, cache: TeacherCache) -> dict[str, Any]:
    """What the measurement is of."""
    return {
        "concept": options.concept or cache.facts.get("concept"),
        "model": options.pretrained_model_name_or_path,
        "erasers": [
            {"folder": str(folder), "scale": scale}
            for folder, scale in zip(
                options.erasers, options.eraser_scales or [1.0] * len(options.erasers), strict=True
            )
        ],
        "cache": {"folder": str(cache.folder), "fingerprint": cache.fingerprint, "boundary": cache.facts["boundary"]},
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "versions": {package: found for package in PACKAGES if (found := installed_version(package)) is not None},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
