"""How erasers do on prompts and seeds that they were not trained with, in velocity space.

No video is made and nobody has to look: the frozen model's own trajectories, in a teacher cache, say at which points it
would draw the concept and in which direction; the model with erasers is asked once at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.environment import PACKAGES, installed_version
from fastunlearn.training import erased, prepare
from fastunlearn.training.cache import Points, PointSet, TeacherCache
from fastunlearn.training.evaluation_report import draw, table
from fastunlearn.training.files import writable, write_json
from fastunlearn.training.memory import explained_out_of_memory
from fastunlearn.training.metrics import Ratio, drift, erasure, localization, mask_share, summarize_masks
from fastunlearn.training.options import EvaluateOptions, PrepareOptions
from fastunlearn.training.placement import model_dtype, usable_device
from fastunlearn.training.video_model import VideoModel

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
        requests = prepare.requests_of(asked)
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


@dataclass
class Measurement:
    """What `measure` finds.

    Attributes:
        erasure: over the points of the target groups.
        localization: over those with masks.
        preserved: the drift over the kept points.
        frozen: the drift of the frozen model from the cache, over the first points: how much rounding alone does.
        mask_shares: of every point with a mask.
        prompts: (group, prompt) to its points' erasure, or drift if they are kept ones.
    """

    erasure: Ratio = field(default_factory=Ratio)
    localization: Ratio = field(default_factory=Ratio)
    preserved: Ratio = field(default_factory=lambda: Ratio(root=True))
    frozen: Ratio = field(default_factory=lambda: Ratio(root=True))
    mask_shares: list[float] = field(default_factory=list)
    prompts: dict[tuple[str, str], Ratio] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """As plain data; None for what there was nothing to measure it by."""
        timesteps = sorted({*self.erasure.timesteps, *self.preserved.timesteps}, reverse=True)
        masks = summarize_masks(self.mask_shares)
        return {
            "erasure_coefficient": self.erasure.total,
            "preserved_drift": self.preserved.total,
            "localization": self.localization.total,
            "mask_share": None if masks is None else masks._asdict(),
            "frozen_drift": self.frozen.total,
            "target_points": self.erasure.points,
            "kept_points": self.preserved.points,
            "by_timestep": [self._row(t, t) for t in timesteps],
            "by_timesteps": [self._row(part[0], part[-1]) for part in parts(timesteps)],
            "by_prompt": [
                {
                    "group": group,
                    "prompt": prompt,
                    "points": ratio.points,
                    "preserved_drift" if group == KEPT else "erasure_coefficient": ratio.total,
                }
                for (group, prompt), ratio in self.prompts.items()
            ],
        }

    def _row(self, first: float, last: float) -> dict[str, Any]:
        return {
            "from": first,
            "to": last,
            "erasure_coefficient": self.erasure.between(first, last),
            "localization": self.localization.between(first, last),
            "target_points": self.erasure.points_between(first, last),
            "preserved_drift": self.preserved.between(first, last),
            "kept_points": self.preserved.points_between(first, last),
        }


@torch.no_grad()
def measure(model: VideoModel, cache: TeacherCache, batch_size: int, bar: tqdm | None = None) -> Measurement:
    """Asks the model with its erasers at every point of a cache of the same model.

    Args:
        model: with erasers attached.
        cache: of the model without; its group "kept" is what is to stay, the others are targets.
        batch_size: points that go through the model at a time.
        bar: a progress bar to advance by points.

    Raises:
        ValueError: the cache is of another model, or a velocity is not finite.
    """
    if cache.facts.get("backbone") != model.backbone.name:
        raise ValueError(f"{cache.folder}: of a {cache.facts.get('backbone')}, but the model is {model.backbone.name}")
    found = Measurement()
    for name, points in cache.groups.items():
        for batch, rows in enumerate(batches(points, batch_size)):
            read = on_device(points.rows(rows), model)
            expert = model.experts[int(points.experts[rows[0]])]
            if batch == 0:
                with erased.without_erasers(model):
                    found.frozen.add(read.t, drift(expert(read.x_t, read.t, read.condition), read.v_cond))
                _check_frozen_drift(found.frozen, cache.folder)
            velocity = expert(read.x_t, read.t, read.condition)
            sums = drift(velocity, read.v_cond) if name == KEPT else erasure(velocity, read.v_uncond, read.v_cond)
            (found.preserved if name == KEPT else found.erasure).add(read.t, sums)
            for index, prompt in enumerate(points.prompts[rows].tolist()):
                of_prompt = found.prompts.setdefault((name, cache.prompts[prompt]), Ratio(root=name == KEPT))
                of_prompt.add(read.t[index], type(sums)(*(part[index : index + 1] for part in sums)))
            if name != KEPT and read.mask is not None:
                found.mask_shares += mask_share(read.mask).tolist()
                channel = model.backbone.channel_dim
                found.localization.add(read.t, localization(velocity, read.v_cond, read.mask, channel))
            if bar is not None:
                bar.update(len(rows))
    return found


def batches(points: PointSet, size: int) -> list[Tensor]:
    """The numbers of all points, in batches of at most `size` that are for one of the model's transformers each."""
    return [
        batch
        for expert in points.experts.unique().tolist()
        for batch in (points.experts == expert).nonzero()[:, 0].split(size)
    ]


def on_device(points: Points, model: VideoModel) -> Points:
    """Points as the model computes with them; t stays where it is."""
    x_t, v_uncond, v_cond = (
        part.to(model.device, model.dtype) for part in (points.x_t, points.v_uncond, points.v_cond)
    )
    condition = {name: tensor.to(model.device) for name, tensor in points.condition.items()}
    mask = None if points.mask is None else points.mask.to(model.device)
    return Points(x_t, points.t, condition, v_uncond, v_cond, mask)


def parts(timesteps: Sequence[float], most: int = 10) -> list[Sequence[float]]:
    """Neighbouring timesteps together, in at most as many parts, as equal as can be."""
    count = min(most, len(timesteps))
    edges = [part * len(timesteps) // count for part in range(count + 1)] if count else []
    return [timesteps[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def _check_frozen_drift(frozen: Ratio, folder: Path) -> None:
    total = frozen.total
    if total is not None and total > _MOST_FROZEN_DRIFT:
        raise ValueError(
            f"{folder}: the model without erasers differs from this cache by {total:.0%}: it was made with another "
            "model, or in a precision that this one overflows in"
        )


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
