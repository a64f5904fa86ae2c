"""Runs a model with erasers at every point of a teacher cache, and collects the metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.training.cache.provenance import check_inputs_fit
from fastunlearn.training.cache.reader import Points, PointSet, TeacherCache
from fastunlearn.training.data.recipe import KEPT
from fastunlearn.training.evaluation.metrics import (
    Ratio,
    Sums,
    distance,
    drift,
    erasure,
    localization,
    mask_share,
    summarize_masks,
)
from fastunlearn.training.model.erased import without_erasers
from fastunlearn.training.model.video_model import VideoModel

# Rounding alone makes the frozen model drift from its cache, by 1 to 2 percent in half precision on another GPU.
_MAX_FROZEN_DRIFT = 0.1


@dataclass
class Measurement:
    """The metrics over all points of a cache.

    Attributes:
        erasure: the erasure coefficient over the points of the target groups.
        distance: the distance to the baseline over the same points.
        localization: the localization over the target points that have masks.
        preserved: the drift over the kept points.
        frozen: the drift of the model without erasers from the cache, over one batch per group, by rounding.
        mask_shares: the share of tokens inside the mask, for every target point that has one.
        prompts: (group, prompt) -> the drift over that prompt's points if they are kept, else the erasure coefficient.
    """

    erasure: Ratio = field(default_factory=Ratio)
    distance: Ratio = field(default_factory=lambda: Ratio(root=True))
    localization: Ratio = field(default_factory=Ratio)
    preserved: Ratio = field(default_factory=lambda: Ratio(root=True))
    frozen: Ratio = field(default_factory=lambda: Ratio(root=True))
    mask_shares: list[float] = field(default_factory=list)
    prompts: dict[tuple[str, str], Ratio] = field(default_factory=dict)

    def add(self, group: str, prompts: Sequence[str], points: Points, velocity: Tensor, channel_dim: int) -> None:
        """Adds a batch of points.

        Args:
            group: the group of the points.
            prompts: the prompt of each point.
            points: the batch.
            velocity: the velocity of the model with erasers, at these points.
            channel_dim: the channel dimension of the velocities.

        Raises:
            ValueError: a velocity is not finite.
        """
        is_kept = group == KEPT
        sums = drift(velocity, points.v_cond) if is_kept else erasure(velocity, points.v_uncond, points.v_cond)
        (self.preserved if is_kept else self.erasure).add(points.t, sums)
        for index, prompt in enumerate(prompts):
            ratio = self.prompts.setdefault((group, prompt), Ratio(root=is_kept))
            ratio.add(points.t[index], Sums(*(values[index : index + 1] for values in sums)))
        if is_kept:
            return
        self.distance.add(points.t, distance(velocity, points.v_uncond, points.v_cond))
        if points.mask is not None:
            self.mask_shares += mask_share(points.mask).tolist()
            self.localization.add(points.t, localization(velocity, points.v_cond, points.mask, channel_dim))

    @property
    def early_erasure(self) -> float | None:
        """The erasure coefficient over the earlier half of the timesteps, at which a video's content is decided."""
        timesteps = self.erasure.timesteps
        return self.erasure.between(math.inf, timesteps[(len(timesteps) - 1) // 2]) if timesteps else None

    def report(self) -> dict[str, Any]:
        """The measurement as plain data for JSON. What could not be measured is None."""
        timesteps = sorted({*self.erasure.timesteps, *self.preserved.timesteps}, reverse=True)
        masks = summarize_masks(self.mask_shares)
        return {
            "erasure_coefficient": self.erasure.total,
            "early_erasure_coefficient": self.early_erasure,
            "distance_to_baseline": self.distance.total,
            "preserved_drift": self.preserved.total,
            "localization": self.localization.total,
            "mask_share": None if masks is None else masks._asdict(),
            "frozen_drift": self.frozen.total,
            "target_points": self.erasure.points,
            "kept_points": self.preserved.points,
            "by_timestep": [self._row(t, t) for t in timesteps],
            "by_timesteps": [self._row(neighbours[0], neighbours[-1]) for neighbours in group_timesteps(timesteps)],
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
        """The metrics over the timesteps from `first`, the larger, to `last`."""
        return {
            "from": first,
            "to": last,
            "erasure_coefficient": self.erasure.between(first, last),
            "distance_to_baseline": self.distance.between(first, last),
            "localization": self.localization.between(first, last),
            "target_points": self.erasure.points_between(first, last),
            "preserved_drift": self.preserved.between(first, last),
            "kept_points": self.preserved.points_between(first, last),
        }


@torch.no_grad()
def measure(model: VideoModel, cache: TeacherCache, batch_size: int, bar: tqdm | None = None) -> Measurement:
    """Runs the model with its erasers at every point of a cache made with the same model.

    Args:
        model: a model with erasers attached.
        cache: a cache made with the model without erasers. Its group "kept" must not change; all others are targets.
        batch_size: points per forward pass.
        bar: a progress bar to advance by 1 per point.

    Raises:
        ValueError: the cache was made with another model, or a velocity is not finite.
    """
    check_inputs_fit(cache.facts, model, cache.condition_shapes)
    measurement = Measurement()
    for group, points in cache.groups.items():
        for number, rows in enumerate(batches(points, batch_size)):
            batch = on_device(points.rows(rows), model)
            expert = model.experts[int(points.experts[rows[0]])]
            if number == 0:
                with without_erasers(model):
                    frozen_velocity = expert(batch.x_t, batch.t, batch.condition)
                measurement.frozen.add(batch.t, drift(frozen_velocity, batch.v_cond))
                _check_frozen_drift(measurement.frozen, cache.folder)
            velocity = expert(batch.x_t, batch.t, batch.condition)
            prompts = [cache.prompts[prompt] for prompt in points.prompts[rows].tolist()]
            measurement.add(group, prompts, batch, velocity, model.family.channel_dim)
            if bar is not None:
                bar.update(len(rows))
    return measurement


def batches(points: PointSet, size: int) -> list[Tensor]:
    """The row numbers of all points, in batches of at most `size`. The points of a batch belong to one expert."""
    return [
        batch
        for expert in points.experts.unique().tolist()
        for batch in (points.experts == expert).nonzero()[:, 0].split(size)
    ]


def on_device(points: Points, model: VideoModel) -> Points:
    """Points on the model's device and in its dtype. Their timesteps stay on the CPU."""
    x_t, v_uncond, v_cond = (
        tensor.to(model.device, model.dtype) for tensor in (points.x_t, points.v_uncond, points.v_cond)
    )
    condition = {name: tensor.to(model.device) for name, tensor in points.condition.items()}
    mask = None if points.mask is None else points.mask.to(model.device)
    return Points(x_t, points.t, condition, v_uncond, v_cond, mask)


def group_timesteps(timesteps: Sequence[float], most: int = 10) -> list[Sequence[float]]:
    """Divides sorted timesteps into at most `most` groups of neighbours, of sizes as equal as possible."""
    count = min(most, len(timesteps))
    edges = [number * len(timesteps) // count for number in range(count + 1)] if count else []
    return [timesteps[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def _check_frozen_drift(frozen: Ratio, folder: Path) -> None:
    total = frozen.total
    if total is not None and total > _MAX_FROZEN_DRIFT:
        raise ValueError(
            f"{folder}: expected a teacher cache of this model, got one that the model without erasers differs from by "
            f"{total:.0%}; it was made with another model, or the model overflows in this precision"
        )
