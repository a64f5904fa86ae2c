"""How far a concept is erased, and what else has changed: measured on velocities, without making a video.

Each metric is a ratio of two sums over samples. `erasure`, `distance`, `drift` and `localization` compute what each
sample adds to the two sums; `Ratio` accumulates them, per timestep and in total. Dividing only after summing weights
each sample by how much there was to change: where the velocities with and without the prompt nearly agree, the quotient
of that sample alone would be noise.

v is the frozen model's velocity, v' that of the model with erasers, at the same x_t, t and prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastunlearn.dtypes import MASK
from fastunlearn.ops.arguments import check_shape, check_tensor
from fastunlearn.ops.spatial_masks import drop_channel, match_resolution


class Sums(NamedTuple):
    """What each sample of a batch adds to the two sums of a metric: two (B,) tensors, float32 or wider."""

    numerator: Tensor
    denominator: Tensor


def erasure(velocity: Tensor, v_uncond: Tensor, v_cond: Tensor) -> Sums:
    """The erasure coefficient, <v' - v_uncond, v_cond - v_uncond> / ||v_cond - v_uncond||^2.

    It is 1 if nothing is erased, 0 if the prompt has no more effect than one without the concept, and below 0 if the
    prompt leads away from the concept.

    Args:
        velocity: v' (B, ...), floating point.
        v_uncond: the frozen model's velocity without the concept: for the negative prompt, or for a replacement prompt.
        v_cond: the frozen model's velocity for the prompt.

    Raises:
        TypeError, ValueError: a tensor has a wrong dtype, shape or device.
    """
    _check_velocities(velocity, v_uncond=v_uncond, v_cond=v_cond)
    start = _wide(v_uncond)
    direction = _wide(v_cond) - start
    return Sums(_sum((_wide(velocity) - start) * direction), _sum(direction.square()))


def distance(velocity: Tensor, v_uncond: Tensor, v_cond: Tensor) -> Sums:
    """The squared distance to the baseline, ||v' - v_uncond||^2 / ||v_cond - v_uncond||^2.

    Accumulate it with `Ratio(root=True)`, whose root is the distance. Like the erasure coefficient it is 1 if nothing
    is erased and 0 if the prompt has no more effect than one without the concept. But leading away from the concept,
    and every other change of the velocity, make it larger.

    Args:
        velocity: v' (B, ...), floating point.
        v_uncond: the frozen model's velocity without the concept, of the same shape.
        v_cond: the frozen model's velocity for the prompt, of the same shape.

    Raises:
        TypeError, ValueError: a tensor has a wrong dtype, shape or device.
    """
    _check_velocities(velocity, v_uncond=v_uncond, v_cond=v_cond)
    start = _wide(v_uncond)
    return Sums(_sum((_wide(velocity) - start).square()), _sum((_wide(v_cond) - start).square()))


def drift(velocity: Tensor, v_cond: Tensor) -> Sums:
    """The squared drift, ||v' - v||^2 / ||v||^2. Accumulate it with `Ratio(root=True)`, whose root is the drift.

    Args:
        velocity: v' (B, ...), floating point.
        v_cond: v, of the same shape.

    Raises:
        TypeError, ValueError: a tensor has a wrong dtype, shape or device.
    """
    _check_velocities(velocity, v_cond=v_cond)
    frozen = _wide(v_cond)
    return Sums(_sum((_wide(velocity) - frozen).square()), _sum(frozen.square()))


def localization(velocity: Tensor, v_cond: Tensor, mask: Tensor, channel_dim: int) -> Sums:
    """The share of the change that lies inside the concept's mask M: sum M (v' - v)^2 / sum (v' - v)^2.

    For a change spread evenly over the video it equals the share of tokens inside the mask, `mask_share`.

    Args:
        velocity: v' (B, ...), floating point.
        v_cond: v, of the same shape.
        mask: M (B or 1, *spatial) in [0, 1], of any resolution; resampled by nearest neighbour.
        channel_dim: the channel dimension of the velocities.

    Raises:
        TypeError, ValueError: a tensor has a wrong dtype, shape or device.
    """
    _check_velocities(velocity, v_cond=v_cond)
    check_tensor("mask", mask, MASK, like=velocity)
    change = (_wide(velocity) - _wide(v_cond)).square()
    inside = match_resolution(drop_channel(mask, velocity.shape, channel_dim), velocity.shape, channel_dim)
    return Sums(_sum(change * inside), _sum(change))


def mask_share(mask: Tensor) -> Tensor:
    """The mean of each mask, (B, *spatial) -> (B,) float32. For a mask of 0 and 1: the share of tokens inside it."""
    check_tensor("mask", mask, MASK)
    return mask.flatten(1).float().mean(1)


class Ratio:
    """A metric over many samples: sum of numerators / sum of denominators, in float64, per timestep and in total."""

    def __init__(self, root: bool = False) -> None:
        """`root`: take the square root of the ratio."""
        self._root = root
        self._sums: dict[float, list[float]] = {}  # timestep -> numerator, denominator, number of samples

    def add(self, t: Tensor, sums: Sums) -> None:
        """Adds a batch. `t` holds a timestep per sample, (B,), or one for all.

        Raises:
            ValueError: `t` has another shape, or a sum is not finite because the model's velocity is not.
        """
        numerators, denominators = (values.cpu().double().tolist() for values in sums)
        if t.dim() > 1 or (t.dim() == 1 and len(t) != len(numerators)):
            raise ValueError(f"t: expected () or ({len(numerators)},), got {tuple(t.shape)}")
        timesteps = t.expand(len(numerators)).tolist()
        for timestep, numerator, denominator in zip(timesteps, numerators, denominators, strict=True):
            if not (math.isfinite(numerator) and math.isfinite(denominator)):
                raise ValueError(f"sums: expected finite ones, got {numerator} / {denominator} at t={timestep:g}")
            entry = self._sums.setdefault(float(timestep), [0.0, 0.0, 0])
            for index, value in enumerate((numerator, denominator, 1)):
                entry[index] += value

    @property
    def timesteps(self) -> list[float]:
        """The timesteps of all samples, in sampling order: from the largest (noise) to the smallest (video)."""
        return sorted(self._sums, reverse=True)

    @property
    def points(self) -> int:
        """The number of samples."""
        return self.points_between(math.inf, -math.inf)

    @property
    def total(self) -> float | None:
        """The metric over all samples. None if there are none or the denominators sum to 0 (no change to localize)."""
        return self.between(math.inf, -math.inf)

    def between(self, first: float, last: float) -> float | None:
        """The metric over the samples with timesteps from `first`, the larger, to `last`. None as for `total`."""
        entries = [entry for t, entry in self._sums.items() if last <= t <= first]
        return self._divided(*(math.fsum(entry[index] for entry in entries) for index in (0, 1)))

    def points_between(self, first: float, last: float) -> int:
        """The number of samples with timesteps from `first`, the larger, to `last`."""
        return int(sum(entry[2] for t, entry in self._sums.items() if last <= t <= first))

    def _divided(self, numerator: float, denominator: float) -> float | None:
        if denominator == 0:
            return None
        ratio = numerator / denominator
        return math.sqrt(ratio) if self._root else ratio


class MaskSummary(NamedTuple):
    """The share of tokens inside the mask: mean, least and most over all masks; and the share of empty masks."""

    mean: float
    least: float
    most: float
    empty: float


def summarize_masks(shares: Iterable[float]) -> MaskSummary | None:
    """Summarizes the `mask_share` of several masks; None if there are none.

    The points of a trajectory share one mask. If every trajectory has the same number of points, as `prepare` makes
    them, the summary over points equals that over trajectories.
    """
    values = list(shares)
    if not values:
        return None
    empty = sum(value == 0 for value in values)
    return MaskSummary(math.fsum(values) / len(values), min(values), max(values), empty / len(values))


def _check_velocities(velocity: Tensor, **others: Tensor) -> None:
    check_tensor("velocity", velocity)
    if velocity.dim() < 2:
        raise ValueError(f"velocity: expected (B, ...), got shape {tuple(velocity.shape)}")
    for name, other in others.items():
        check_tensor(name, other, like=velocity)
        check_shape(name, other, velocity.shape, "that of velocity")


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or wider, without gradients."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(tensor: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return tensor.flatten(1).sum(1)
