"""What `prepare` is to do, decided before it does anything: trajectories, units of work, points."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from fastunlearn.training.data.requests import NEGATIVE, PROMPT, Request
from fastunlearn.training.model.video_model import Defaults
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.random_numbers import random_generator


class Unit(NamedTuple):
    """Trajectories that go through the model together, by their numbers: what one shard is made of."""

    kind: Request
    numbers: list[int]


class Plan:
    """All trajectories of a cache, in units.

    A trajectory's noise and points depend on the seed and its number alone, not on what is beside it.

    Args:
        requests: a trajectory each, numbered in this order.
        options: of `prepare`.
        guidance_scale: of sampling.
        masked: the groups whose points get masks.

    Raises:
        ValueError: there are no requests, or one has no steps.
    """

    def __init__(
        self, requests: Sequence[Request], options: PrepareOptions, guidance_scale: float, masked: Collection[str]
    ) -> None:
        if not requests:
            raise ValueError("requests: expected at least one, got none")
        self.requests, self.options, self.masked = list(requests), options, set(masked)
        self.guidance_scale = guidance_scale
        self.units = list(self._units())
        self.chosen = [self._choose(number) for number in range(len(requests))]

    def _units(self) -> Iterator[Unit]:
        alike: dict[tuple[object, ...], list[int]] = {}
        for number, request in enumerate(self.requests):
            kind = (request.group, request.without, request.follow, request.source is None)
            alike.setdefault(kind, []).append(number)
        size = self.options.batch_size
        for numbers in alike.values():
            for start in range(0, len(numbers), size):
                yield Unit(self.requests[numbers[start]], numbers[start : start + size])

    def _choose(self, number: int) -> list[int]:
        """The steps that points are taken at: one at random in each of as many equal parts as there are to be."""
        total = self.options.num_inference_steps
        request = self.requests[number]
        steps = [step for step in range(total) if request.steps[0] * total <= step < request.steps[1] * total]
        if not steps:
            raise ValueError(f"steps: none of {total} steps is in the part {request.steps} for {request.prompt!r}")
        count = min(self.options.timesteps_per_trajectory, len(steps))
        edges = [part * len(steps) // count for part in range(count + 1)]
        generator = random_generator(self.options.seed, "steps", number)
        return [
            steps[int(torch.randint(low, high, (1,), generator=generator))]
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]

    @property
    def first_watched(self) -> int:
        """The step from which on attention maps are averaged."""
        total = self.options.num_inference_steps
        return min(math.ceil(self.options.mask_start * total), total - 1)

    def everywhere(self, kind: Request) -> list[str]:
        """The conditions that a sampled trajectory asks at every step, in the order they are batched."""
        return [kind.follow] if self.guidance_scale == 1 else [NEGATIVE, kind.follow]

    def elsewhere(self, kind: Request) -> str | None:
        """The condition that it asks besides, where there are points or masks to be had: there is one at most."""
        asked = self.everywhere(kind)
        return next((name for name in (PROMPT, kind.without) if name not in asked), None)

    def is_watched(self, kind: Request, step: int) -> bool:
        """Whether the attention of this step counts for the mask."""
        return kind.group in self.masked and step >= self.first_watched

    @property
    def points(self) -> int:
        """How many the cache will have."""
        return sum(map(len, self.chosen))

    @property
    def forwards(self) -> int:
        """Forward passes of the transformer, counted a sample: a batch of two counts as two."""
        total = 0
        for unit in self.units:
            for number in unit.numbers:
                total += self._forwards(unit.kind, self.chosen[number])
        return total

    def _forwards(self, kind: Request, chosen: Collection[int]) -> int:
        if kind.source is not None:
            return 2 * len(chosen)
        steps = range(self.options.num_inference_steps)
        besides = self.elsewhere(kind)
        extra = 0
        if besides is not None:
            watched = [step for step in steps if besides == PROMPT and self.is_watched(kind, step)]
            extra = len({*chosen, *watched})
        return len(steps) * len(self.everywhere(kind)) + extra


def video_size(options: PrepareOptions, defaults: Defaults) -> dict[str, int]:
    """Height, width and num_frames: the options', or the model's where they leave them out."""
    names = ("height", "width", "num_frames")
    given = {name: getattr(options, name) for name in names}
    return {name: getattr(defaults, name) if given[name] is None else given[name] for name in names}


def guidance_scale_of(options: PrepareOptions, defaults: Defaults) -> float:
    """The options', or the model's where they leave it out."""
    return defaults.guidance_scale if options.guidance_scale is None else options.guidance_scale
