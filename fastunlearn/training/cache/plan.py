"""Plans `prepare`: which trajectories share a batch, which steps become points, which conditions are evaluated."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from fastunlearn.files import shown
from fastunlearn.training.data.requests import NEGATIVE, PROMPT, Request
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.random_numbers import random_generator


class Unit(NamedTuple):
    """A unit of work: trajectories that share a batch and are written as one shard.

    template: the request of the first trajectory. It stands for all of them: they have the same group and the same
        names of conditions, and all or none have a source.
    trajectories: their indices in `Plan.requests`.
    """

    template: Request
    trajectories: list[int]


class Plan:
    """All trajectories of a cache, divided into units of work.

    The noise and the points of a trajectory depend only on the seed and the trajectory's index, not on the trajectories
    that share its batch.

    Args:
        requests: one per trajectory.
        options: the options of `prepare`.
        guidance_scale: the classifier-free guidance scale of sampling.
        masked_groups: the groups whose points get masks.

    Attributes:
        units: the units of work, in the order of their shards.
        point_steps: for each trajectory, the sampling steps that become points, in ascending order.

    Raises:
        ValueError: there are no requests, or the `steps` of a request contain no sampling step.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        options: PrepareOptions,
        guidance_scale: float,
        masked_groups: Collection[str],
    ) -> None:
        if not requests:
            raise ValueError("requests: expected at least one, got none")
        self.requests, self.options, self.masked_groups = list(requests), options, set(masked_groups)
        self.guidance_scale = guidance_scale
        self.units = list(self._units())
        self.point_steps = [self._draw_point_steps(index) for index in range(len(requests))]

    def _units(self) -> Iterator[Unit]:
        batchable: dict[tuple[object, ...], list[int]] = {}
        for index, request in enumerate(self.requests):
            key = (request.group, request.baseline, request.follow, request.source is None)
            batchable.setdefault(key, []).append(index)
        batch_size = self.options.batch_size
        for indices in batchable.values():
            for start in range(0, len(indices), batch_size):
                yield Unit(self.requests[indices[start]], indices[start : start + batch_size])

    def _draw_point_steps(self, trajectory: int) -> list[int]:
        """Divides the steps into as many equal parts as there are points, and draws one step from each part."""
        total = self.options.num_inference_steps
        request = self.requests[trajectory]
        start, end = request.steps
        steps = [step for step in range(total) if start * total <= step < end * total]
        if not steps:
            raise ValueError(
                f"steps: expected a range with at least one of the {total} sampling steps in it, got "
                f"{request.steps} for {shown(request.prompt)}"
            )
        count = min(self.options.timesteps_per_trajectory, len(steps))
        edges = [part * len(steps) // count for part in range(count + 1)]
        generator = random_generator(self.options.seed, "steps", trajectory)
        return [
            steps[int(torch.randint(low, high, (1,), generator=generator))]
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]

    def conditions_at_every_step(self, request: Request) -> list[str]:
        """The conditions that sampling needs at every step, in the order in which they are batched."""
        is_guided = self.guidance_scale != 1 and request.follow != NEGATIVE
        return [NEGATIVE, request.follow] if is_guided else [request.follow]

    def extra_condition(self, request: Request) -> str | None:
        """The condition that points or masks need but sampling does not; None if there is none. There are never two.

        It is evaluated only at steps that become points or whose attention is captured.
        """
        sampled = self.conditions_at_every_step(request)
        return next((name for name in (PROMPT, request.baseline) if name not in sampled), None)

    def captures_attention(self, request: Request, step: int) -> bool:
        """Whether the attention maps of this step are averaged into the mask."""
        total = self.options.num_inference_steps
        first_captured = min(math.ceil(self.options.mask_start * total), total - 1)
        return request.group in self.masked_groups and step >= first_captured

    @property
    def num_points(self) -> int:
        """The number of points in the cache."""
        return sum(map(len, self.point_steps))

    @property
    def num_forwards(self) -> int:
        """The number of forward passes of a transformer, per sample: a batch of two counts as two."""
        return sum(
            self._num_forwards(unit.template, self.point_steps[index])
            for unit in self.units
            for index in unit.trajectories
        )

    def _num_forwards(self, request: Request, point_steps: Collection[int]) -> int:
        if request.source is not None:
            return 2 * len(point_steps)
        steps = range(self.options.num_inference_steps)
        extra_condition, extra_steps = self.extra_condition(request), set[int]()
        if extra_condition is not None:
            extra_steps.update(point_steps)
        if extra_condition == PROMPT:
            extra_steps.update(step for step in steps if self.captures_attention(request, step))
        return len(steps) * len(self.conditions_at_every_step(request)) + len(extra_steps)
