"""Chooses the points of the cache that each training step uses, and those that none uses.

The points of a step depend only on the seed and the step's number. A resumed run therefore uses the same points as an
uninterrupted one, and several processes together use the same points as one process with a batch of the total size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.files import one_line, shown
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.random_numbers import random_generator

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
LEAST_TRAJECTORIES = 4  # of a group, to hold one out: with fewer, training would miss it too much


def hold_out(groups: Mapping[str, Any], share: float, seed: int) -> dict[str, Tensor]:
    """Chooses points that training never uses, so that the erasers can be measured at them.

    Whole trajectories are held out, because the points of a trajectory look alike. Every group loses `share` of its
    trajectories, rounded, but at least one, and never all points for one of the model's transformers.

    Args:
        groups: the groups of the cache.
        share: the share of the trajectories; 0 holds none out.
        seed: the random seed of the choice.

    Returns:
        Group -> (K,) bool, for each of its K points whether it is held out. Groups without any are left out: those of
        fewer than `LEAST_TRAJECTORIES` trajectories.
    """
    held_out = {}
    for name, points in groups.items():
        trajectories = points.trajectories.unique()
        if not share or len(trajectories) < LEAST_TRAJECTORIES:
            continue
        chosen = torch.zeros(len(points), dtype=torch.bool)
        left = max(1, round(share * len(trajectories)))
        order = torch.randperm(len(trajectories), generator=random_generator(seed, "held out", name))
        for trajectory in trajectories[order].tolist():
            more = chosen | (points.trajectories == trajectory)
            if left and torch.equal(points.experts[~more].unique(), points.experts.unique()):
                chosen, left = more, left - 1
        if chosen.any():
            held_out[name] = chosen
    return held_out


class Draw(NamedTuple):
    """The points of a step: row numbers (K,) in the group `target` and in the kept group, all for one `expert`.

    kept_negative: (K,) bool, which of the kept points are read with the negative prompt.
    """

    target: TargetGroup
    expert: int
    target_rows: Tensor
    kept_rows: Tensor
    kept_negative: Tensor


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
        held_out: the points that are never drawn, as `hold_out` returns them.
        negative_share: the share of the kept points that are read with the negative prompt.

    Raises:
        ValueError: a group is missing or empty, there are no kept points for a transformer that has target points, or
            none of them can be read with the negative prompt.
    """

    def __init__(
        self,
        groups: Mapping[str, Any],
        targets: Sequence[TargetGroup],
        kept: str | None,
        *,
        size: int,
        seed: int,
        held_out: Mapping[str, Tensor] = MappingProxyType({}),
        negative_share: float = 0.0,
    ) -> None:
        if not targets:
            raise ValueError("targets: expected at least one group, got none")
        self._size, self._seed = size, seed
        self._pools: list[_Pool] = []
        self._shares: list[float] = []
        all_kept = None if kept is None else _rows_by_expert(groups, kept, held_out)
        for target in targets:
            rows = _rows_by_expert(groups, target.name, held_out)
            for expert, points in rows.items():
                kept_points = points[:0] if all_kept is None else all_kept.get(expert, points[:0])
                if all_kept is not None and not len(kept_points):
                    raise ValueError(
                        f"kept: expected points for transformer {expert} in group {shown(kept)}, because {len(points)} "
                        f"points of group {shown(target.name)} are for it, got none; prepare more kept prompts, or set "
                        "preservation_weight to 0"
                    )
                self._pools.append(_Pool(target, expert, points, kept_points))
                self._shares.append(target.share * len(points) / sum(map(len, rows.values())))
        self._has_negative = None
        if kept is not None and negative_share:
            self._has_negative, self._negative_share = groups[kept].has_negative, negative_share
            if not self._has_negative.any():
                raise ValueError(
                    f"kept: expected points in group {shown(kept)} whose v_uncond is of the negative prompt, with that "
                    f"prompt's condition in the cache, because kept_negative_share is {negative_share:g}, got none; "
                    "set it to 0, or prepare the cache with some kept prompts that have no other prompt after a tab"
                )
        self._offset = torch.rand(1, generator=random_generator(seed, "offset")).item()

    def draw(self, step: int) -> Draw:
        """Draws the points of a step; steps are counted from 0."""
        pool = self._pools[self._pool_index(step)]
        generator = random_generator(self._seed, step)
        target_rows = _choose(pool.target_points, self._size, generator)
        kept_rows = _choose(pool.kept_points, self._size, generator) if len(pool.kept_points) else pool.kept_points
        return Draw(pool.target, pool.expert, target_rows, kept_rows, self._negative(step, kept_rows))

    def _negative(self, step: int, kept_rows: Tensor) -> Tensor:
        """Which kept points of a step are read with the negative prompt: over many steps, the share that was asked for.

        The rows are in random order, so the first ones are as good as any.
        """
        negative = torch.zeros(len(kept_rows), dtype=torch.bool)
        if self._has_negative is not None:
            per_step = self._negative_share * len(kept_rows)
            negative[: int((step + 1) * per_step) - int(step * per_step)] = True
            negative &= self._has_negative[kept_rows]
        return negative

    def _pool_index(self, step: int) -> int:
        # The multiples of the golden ratio modulo 1 fill the interval more evenly than random numbers.
        position = (self._offset + step * _GOLDEN_RATIO) % 1 * sum(self._shares)
        for index, share in enumerate(self._shares):
            position -= share
            if position < 0:
                return index
        return len(self._shares) - 1


def _rows_by_expert(groups: Mapping[str, Any], name: str, held_out: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The rows of a group that may be drawn, by the transformer that they are for."""
    if name not in groups:
        expected = one_line(", ".join(map(shown, groups)) or "none, because the cache is empty")
        raise ValueError(f"group: expected one of the cache's groups ({expected}), got {shown(name)}")
    experts: Tensor = groups[name].experts
    if not len(experts):
        raise ValueError(f"group {shown(name)} of the cache: expected at least one point, got none")
    is_drawn = ~held_out.get(name, torch.zeros(len(experts), dtype=torch.bool))
    return {expert: ((experts == expert) & is_drawn).nonzero()[:, 0] for expert in experts.unique().tolist()}


def _choose(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draws `size` of the points. None is drawn again before all of them have been drawn."""
    rounds = [torch.randperm(len(points), generator=generator) for _ in range(math.ceil(size / len(points)))]
    return points[torch.cat(rounds)[:size]]
