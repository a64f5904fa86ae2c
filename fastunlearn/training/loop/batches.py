"""Which points of the cache a step of training sees.

A step's draw is a function of the seed and the step's number alone. So a resumed run sees what an undisturbed one
would have seen, and any number of processes what one would have seen with as much larger a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.training.options import TargetGroup
from fastunlearn.training.random_numbers import random_generator

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Draw(NamedTuple):
    """A step's points: numbers in the group `target` and in the kept group, (K,) each; all are for one `expert`."""

    target: TargetGroup
    expert: int
    target_rows: Tensor
    kept_rows: Tensor


class _Kind(NamedTuple):
    """What all of a step's points have in common."""

    target: TargetGroup
    expert: int
    target_points: Tensor
    kept_points: Tensor


class Batches:
    """Draws the points of every step.

    A step takes its target points from one group and for one of the model's transformers, and kept points for the same
    one. These kinds of steps come as often as the groups' shares and their points say, evenly spread. Within a step no
    point comes twice, unless there are too few.

    Args:
        groups: of the cache.
        targets: the groups to draw target points from.
        kept: the group of points to keep, or None: no kept points are drawn.
        size: points of each sort in a step, over all processes.
        seed: of the draws.

    Raises:
        ValueError: a group is missing or empty, or there are no kept points for a transformer that has target points.
    """

    def __init__(
        self, groups: Mapping[str, Any], targets: Sequence[TargetGroup], kept: str | None, *, size: int, seed: int
    ) -> None:
        if not targets:
            raise ValueError("targets: expected at least one group, got none")
        self._size, self._seed = size, seed
        self._kinds: list[_Kind] = []
        self._shares: list[float] = []
        kept_experts = None if kept is None else _experts(groups, kept)
        for target in targets:
            experts = _experts(groups, target.name)
            for expert in experts.unique().tolist():
                points = (experts == expert).nonzero()[:, 0]
                kept_points = points[:0] if kept_experts is None else (kept_experts == expert).nonzero()[:, 0]
                if kept_experts is not None and not len(kept_points):
                    raise ValueError(
                        f"kept: group {kept!r} has no points for transformer {expert}, which {len(points)} points of "
                        f"group {target.name!r} are for: prepare more, or set preservation_weight to 0"
                    )
                self._kinds.append(_Kind(target, expert, points, kept_points))
                self._shares.append(target.share * len(points) / len(experts))
        self._offset = torch.rand(1, generator=random_generator(seed, "offset")).item()

    def draw(self, step: int) -> Draw:
        """The points of a step, counted from 0."""
        kind = self._kinds[self._kind(step)]
        generator = random_generator(self._seed, step)
        target_rows = _choose(kind.target_points, self._size, generator)
        kept_rows = _choose(kind.kept_points, self._size, generator) if len(kind.kept_points) else kind.kept_points
        return Draw(kind.target, kind.expert, target_rows, kept_rows)

    def _kind(self, step: int) -> int:
        # Multiples of the golden ratio, modulo 1, fill the interval more evenly than random numbers.
        place = (self._offset + step * _GOLDEN_RATIO) % 1 * sum(self._shares)
        for kind, share in enumerate(self._shares):
            place -= share
            if place < 0:
                return kind
        return len(self._shares) - 1


def _experts(groups: Mapping[str, Any], name: str) -> Tensor:
    if name not in groups:
        raise ValueError(f"the cache has no group {name!r}, only {', '.join(map(repr, groups)) or 'none'}")
    experts: Tensor = groups[name].experts
    if not len(experts):
        raise ValueError(f"the cache's group {name!r} is empty")
    return experts


def _choose(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    rounds = [torch.randperm(len(points), generator=generator) for _ in range(math.ceil(size / len(points)))]
    return points[torch.cat(rounds)[:size]]
