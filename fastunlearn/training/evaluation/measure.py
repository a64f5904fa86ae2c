"""Asks a model with erasers at every point of a teacher cache, and adds up what the metrics say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.training.cache.reader import Points, PointSet, TeacherCache
from fastunlearn.training.evaluation.metrics import Ratio, drift, erasure, localization, mask_share, summarize_masks
from fastunlearn.training.model import erased
from fastunlearn.training.model.video_model import VideoModel

KEPT = "kept"  # the group of what is to stay; every other group is one of targets

# The frozen model asked again differs from its cache by rounding: by 1 or 2 percent in half precision on another GPU.
_MOST_FROZEN_DRIFT = 0.1


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
    if cache.facts.get("backbone") != model.family.name:
        raise ValueError(f"{cache.folder}: of a {cache.facts.get('backbone')}, but the model is {model.family.name}")
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
                channel = model.family.channel_dim
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
