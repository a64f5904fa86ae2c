"""How far a concept is erased, and what else has changed: read off velocities, without a video or a judge.

Each metric is a ratio of sums. What one sample adds to both sums comes from the functions here, one a metric;
`Ratio` adds samples up, in total and a timestep apart. Summed before divided, a point counts by how much there was to
change at it: where prompt and no prompt nearly agree, their quotient alone would be noise.

v is the frozen model's velocity, v' that of the model with erasers, at the same x_t, t and prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastunlearn.ops.arguments import MASK, check_shape, check_tensor
from fastunlearn.ops.spatial_masks import drop_channel, match_resolution


class Sums(NamedTuple):
    """What each sample of a batch adds to a ratio: two (B,) tensors, float32 or wider."""

    numerator: Tensor
    denominator: Tensor


def erasure(velocity: Tensor, v_uncond: Tensor, v_cond: Tensor) -> Sums:
    """The erasure coefficient, <v' - v_uncond, v_cond - v_uncond> / ||v_cond - v_uncond||^2.

    1: nothing is erased. 0: the prompt says no more than what stands for it. Below 0: it repels.

    Args:
        velocity: v' (B, ...), floating point as the others.
        v_uncond: the frozen model's, with what stands for the concept: the negative prompt, or another.
        v_cond: the frozen model's, with the prompt.

    Raises:
        TypeError, ValueError: a tensor is of another dtype, shape or device.
    """
    _check_velocities(velocity, v_uncond=v_uncond, v_cond=v_cond)
    start = _wide(v_uncond)
    direction = _wide(v_cond) - start
    return Sums(_sum((_wide(velocity) - start) * direction), _sum(direction.square()))


def drift(velocity: Tensor, v_cond: Tensor) -> Sums:
    """The squared drift, ||v' - v||^2 / ||v||^2. Its root is the drift: `Ratio(root=True)`.

    Args:
        velocity: v' (B, ...), floating point.
        v_cond: v.

    Raises:
        TypeError, ValueError: a tensor is of another dtype, shape or device.
    """
    _check_velocities(velocity, v_cond=v_cond)
    frozen = _wide(v_cond)
    return Sums(_sum((_wide(velocity) - frozen).square()), _sum(frozen.square()))


def localization(velocity: Tensor, v_cond: Tensor, mask: Tensor, channel_dim: int) -> Sums:
    """The share of the change that lies where the concept is: sum M (v' - v)^2 / sum (v' - v)^2.

    A change that knew nothing of the mask would have the mask's own share (`mask_share`).

    Args:
        velocity: v' (B, ...), floating point.
        v_cond: v.
        mask: (B or 1, *spatial) in [0, 1], of any resolution; read by nearest neighbour.
        channel_dim: which dim of the velocities is the channel.

    Raises:
        TypeError, ValueError: a tensor is of another dtype, shape or device.
    """
    _check_velocities(velocity, v_cond=v_cond)
    check_tensor("mask", mask, MASK, like=velocity)
    change = (_wide(velocity) - _wide(v_cond)).square()
    inside = match_resolution(drop_channel(mask, velocity.shape, channel_dim), velocity.shape, channel_dim)
    return Sums(_sum(change * inside), _sum(change))


def mask_share(mask: Tensor) -> Tensor:
    """(B, *spatial) to (B,) float32: the mean of each mask, so the share of tokens in one of zeros and ones."""
    check_tensor("mask", mask, MASK)
    return mask.flatten(1).float().mean(1)


class Ratio:
    """Adds samples up: sum of numerators / sum of denominators, in total and at each timestep. Sums are float64."""

    def __init__(self, root: bool = False) -> None:
        """`root`: whether the metric is the square root of the ratio."""
        self._root = root
        self._sums: dict[float, list[float]] = {}  # t: numerator, denominator, points

    def add(self, t: Tensor, sums: Sums) -> None:
        """Adds a batch. `t`: (B,), or one timestep for all.

        Raises:
            ValueError: `t` has another shape, or a sum is not finite: the model's velocity is not.
        """
        numerators, denominators = (part.double().cpu().tolist() for part in sums)
        if t.dim() > 1 or (t.dim() == 1 and len(t) != len(numerators)):
            raise ValueError(f"t: expected () or ({len(numerators)},), got {tuple(t.shape)}")
        for at, numerator, denominator in zip(
            t.expand(len(numerators)).tolist(), numerators, denominators, strict=True
        ):
            if not (math.isfinite(numerator) and math.isfinite(denominator)):
                raise ValueError(f"sums: expected finite ones, got {numerator} / {denominator} at t={at:g}")
            entry = self._sums.setdefault(float(at), [0.0, 0.0, 0])
            for index, part in enumerate((numerator, denominator, 1)):
                entry[index] += part

    @property
    def timesteps(self) -> list[float]:
        """All there are, in the order of sampling: from noise, the largest, to the video."""
        return sorted(self._sums, reverse=True)

    @property
    def points(self) -> int:
        """How many samples were added."""
        return self.points_between(math.inf, -math.inf)

    @property
    def total(self) -> float | None:
        """Over all samples. None without any, or if denominators sum to 0, as where there is no change to localize."""
        return self.between(math.inf, -math.inf)

    def between(self, first: float, last: float) -> float | None:
        """Over the samples whose timesteps are from `first`, the larger, to `last`; None as for `total`."""
        entries = [entry for t, entry in self._sums.items() if last <= t <= first]
        return self._divided(*(math.fsum(entry[index] for entry in entries) for index in (0, 1)))

    def points_between(self, first: float, last: float) -> int:
        """How many samples have timesteps from `first`, the larger, to `last`."""
        return int(sum(entry[2] for t, entry in self._sums.items() if last <= t <= first))

    def _divided(self, numerator: float, denominator: float) -> float | None:
        if denominator == 0:
            return None
        ratio = numerator / denominator
        return math.sqrt(ratio) if self._root else ratio


class MaskSummary(NamedTuple):
    """What part of the tokens masks cover: the mean, the least and the most; and what part of the masks cover none."""

    mean: float
    least: float
    most: float
    empty: float


def summarize_masks(shares: Iterable[float]) -> MaskSummary | None:
    """What `mask_share` said of several masks; None if there were none.

    Points of a trajectory share its mask. Where every trajectory has as many points, the summary over points is that
    over trajectories.
    """
    values = list(shares)
    if not values:
        return None
    empty = sum(value == 0 for value in values)
    return MaskSummary(math.fsum(values) / len(values), min(values), max(values), empty / len(values))


def _check_velocities(velocity: Tensor, **others: Tensor) -> None:
    check_tensor("velocity", velocity)
    if velocity.dim() < 2:
        raise ValueError(f"velocity must be (B, ...), got shape {tuple(velocity.shape)}")
    for name, other in others.items():
        check_tensor(name, other, like=velocity)
        check_shape(name, other, velocity.shape, "that of velocity")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).sum(1)
