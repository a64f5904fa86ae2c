"""Chooses the points of the cache that each training step uses.

The points of a step depend only on the seed and the step's number. A resumed run therefore uses the same points as an
uninterrupted one, and several processes together use the same points as one process with a batch of the total size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.files import one_line, shown
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.random_numbers import random_generator

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Draw(NamedTuple):
    """The points of a step: row numbers (K,) in the group `target` and in the kept group, all for one `expert`."""

    target: TargetGroup
    expert: int
    target_rows: Tensor
    kept_rows: Tensor


class _Pool(NamedTuple):
    """The points that a step may be drawn from: those of one target group, and the kept ones, for one transformer."""

    target: TargetGroup
    expert: int
    target_points: Tensor
    kept_points: Tensor


class Batches:
    """Draws the points of every step.

    All points of a step are for one of the model's transformers, and its target points are from one group. Each such
    pair of a group and a transformer gets its part of the steps, evenly spread over the run: the group's share, divided
    over the transformers like the group's points. No point occurs twice within a step, unless there are fewer points
    than a step needs.

    Args:
        groups: the groups of the cache.
        targets: the groups to draw target points from.
        kept: the group of points to keep, or None to draw no kept points.
        size: the number of target points, and of kept points, per step, over all processes.
        seed: the random seed of the draws.

    Raises:
        ValueError: a group is missing or empty, or there are no kept points for a transformer that has target points.
    """

    def __init__(
        self, groups: Mapping[str, Any], targets: Sequence[TargetGroup], kept: str | None, *, size: int, seed: int
    ) -> None:
        if not targets:
            raise ValueError("targets: expected at least one group, got none")
        self._size, self._seed = size, seed
        self._pools: list[_Pool] = []
        self._shares: list[float] = []
        kept_experts = None if kept is None else _experts(groups, kept)
        for target in targets:
            experts = _experts(groups, target.name)
            for expert in experts.unique().tolist():
                points = (experts == expert).nonzero()[:, 0]
                kept_points = points[:0] if kept_experts is None else (kept_experts == expert).nonzero()[:, 0]
                if kept_experts is not None and not len(kept_points):
                    raise ValueError(
                        f"kept: expected points for transformer {expert} in group {shown(kept)}, because {len(points)} "
                        f"points of group {shown(target.name)} are for it, got none; prepare more kept prompts, or set "
                        "preservation_weight to 0"
                    )
                self._pools.append(_Pool(target, expert, points, kept_points))
                self._shares.append(target.share * len(points) / len(experts))
        self._offset = torch.rand(1, generator=random_generator(seed, "offset")).item()

    def draw(self, step: int) -> Draw:
        """Draws the points of a step; steps are counted from 0."""
        pool = self._pools[self._pool_index(step)]
        generator = random_generator(self._seed, step)
        target_rows = _choose(pool.target_points, self._size, generator)
        kept_rows = _choose(pool.kept_points, self._size, generator) if len(pool.kept_points) else pool.kept_points
        return Draw(pool.target, pool.expert, target_rows, kept_rows)

    def _pool_index(self, step: int) -> int:
        # The multiples of the golden ratio modulo 1 fill the interval more evenly than random numbers.
        position = (self._offset + step * _GOLDEN_RATIO) % 1 * sum(self._shares)
        for index, share in enumerate(self._shares):
            position -= share
            if position < 0:
                return index
        return len(self._shares) - 1


def _experts(groups: Mapping[str, Any], name: str) -> Tensor:
    if name not in groups:
        expected = one_line(", ".join(map(shown, groups)) or "none, because the cache is empty")
        raise ValueError(f"group: expected one of the cache's groups ({expected}), got {shown(name)}")
    experts: Tensor = groups[name].experts
    if not len(experts):
        raise ValueError(f"group {shown(name)} of the cache: expected at least one point, got none")
    return experts


def _choose(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draws `size` of the points. None is drawn again before all of them have been drawn."""
    rounds = [torch.randperm(len(points), generator=generator) for _ in range(math.ceil(size / len(points)))]
    return points[torch.cat(rounds)[:size]]
