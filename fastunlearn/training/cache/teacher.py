"""Runs the frozen model to compute the points of a teacher cache, one unit of work at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.erasers import erasers_disabled
from fastunlearn.families import attentions, find_transformer
from fastunlearn.files import shown
from fastunlearn.training.cache.concept_masks import ConceptMasks
from fastunlearn.training.cache.plan import Plan, Unit
from fastunlearn.training.cache.user_videos import read_latents
from fastunlearn.training.data.requests import INSTEAD, NEGATIVE, PROMPT, Request, distinct_prompts
from fastunlearn.training.model.sampling import Step, denoise, scheduler_for, stack_conditions, velocities
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.random_numbers import random_generator


class _Point(NamedTuple):
    """A point of one trajectory, on the CPU."""

    t: float
    x_t: Tensor
    v_uncond: Tensor
    v_cond: Tensor


class _Trajectory(NamedTuple):
    prompt: str
    points: list[_Point]
    mask: Tensor | None


class Teacher:
    """The frozen model, and the plan of what it is to compute.

    Attributes:
        plan: all trajectories, in units of work.
        prompts: every prompt that is used.
        size: the size of the videos.
        latent_shape: the shape of their latents, without a batch dimension.
        token_grid: the (F, h, w) of their tokens.

    Raises:
        ValueError: a prompt is not encoded, only some prompts of a group contain the concept, or an option does not fit
            the model.
    """

    def __init__(
        self,
        model: VideoModel,
        encoded: Mapping[str, EncodedPrompt],
        requests: Sequence[Request],
        options: PrepareOptions,
    ) -> None:
        self.model, self.encoded, self.options = model, encoded, options
        self.size = model.defaults.size(options.height, options.width, options.num_frames)
        self.latent_shape = model.latent_shape(*self.size)
        self.token_grid = model.token_grid(self.latent_shape)
        self.prompts = distinct_prompts(requests, options.negative_prompt)
        missing = [prompt for prompt in self.prompts if prompt not in encoded]
        if missing:
            raise ValueError(
                f"encoded: expected every prompt and the negative prompt, but {shown(missing[0])} is missing"
            )
        guidance_scale = model.defaults.guidance(options.guidance_scale)
        self.plan = Plan(requests, options, guidance_scale, self._masked_groups(requests))
        layers = len(attentions(find_transformer(model.experts[0])[0], model.family.text_attended))
        out_of_range = [layer for layer in options.mask_layers if not 0 <= layer < layers]
        if out_of_range:
            raise ValueError(f"mask_layers: expected layers from 0 to {layers - 1}, got {out_of_range}")

    def _masked_groups(self, requests: Sequence[Request]) -> set[str]:
        """The groups whose prompts contain the concept."""
        masked = {request.group for request in requests if self.encoded[request.prompt].token_indices}
        for request in requests:
            if request.group in masked and not self.encoded[request.prompt].token_indices:
                raise ValueError(
                    f"concept: expected {shown(self.options.concept)} in all prompts of group {shown(request.group)} "
                    f"or in none, got some with it, and {shown(request.prompt)} without: put these prompts into "
                    "different groups"
                )
        return masked

    def points(self, unit: Unit) -> dict[str, Any]:
        """Computes the points of a unit, trajectory by trajectory, as keyword arguments of `CacheWriter.write`."""
        with ExitStack() as stack:
            for expert in self.model.experts:
                stack.enter_context(erasers_disabled(expert))
            if unit.template.source is None:
                return _stack_points(self._sample(unit))
            return _stack_points([self._noise_video(index) for index in unit.trajectories])

    def _sample(self, unit: Unit) -> list[_Trajectory]:
        """Samples the trajectories of a unit as one batch, and takes points from the steps on the way."""
        plan, template = self.plan, unit.template
        requests = [plan.requests[index] for index in unit.trajectories]
        concept_masks = self._concept_masks(requests)
        extra = plan.extra_condition(template)
        extra_conditions = {} if extra is None else {extra: self._condition(extra, requests)}
        points: list[list[_Point]] = [[] for _ in requests]
        for step in self._denoise(unit, requests, concept_masks):
            rows = [row for row, index in enumerate(unit.trajectories) if step.index in plan.point_steps[index]]
            by_condition: dict[str, Tensor | dict[int, Tensor]] = dict(step.velocities)
            for name, condition in extra_conditions.items():
                captures = name == PROMPT and plan.captures_attention(template, step.index)
                by_condition[name] = self._extra_velocities(
                    step, name, condition, rows, concept_masks if captures else None
                )
            for row in rows:
                v_uncond, v_cond = by_condition[template.baseline][row], by_condition[PROMPT][row]
                points[row].append(_Point(step.t, step.x_t[row].cpu(), v_uncond.cpu(), v_cond.cpu()))
        masks = self._masks(concept_masks, len(requests))
        return [
            _Trajectory(request.prompt, trajectory_points, mask)
            for request, trajectory_points, mask in zip(requests, points, masks, strict=True)
        ]

    def _denoise(self, unit: Unit, requests: Sequence[Request], concept_masks: ConceptMasks | None) -> Iterator[Step]:
        plan, template = self.plan, unit.template
        generators = [random_generator(self.options.seed, "noise", index) for index in unit.trajectories]
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        return denoise(
            self.model,
            noise,
            {name: self._condition(name, requests) for name in plan.conditions_at_every_step(template)},
            follow=template.follow,
            guide_from=NEGATIVE,
            guidance_scale=plan.guidance_scale,
            num_inference_steps=self.options.num_inference_steps,
            generators=generators,
            watch=lambda step: (
                concept_masks.watch if concept_masks and plan.captures_attention(template, step) else None
            ),
        )

    def _extra_velocities(
        self,
        step: Step,
        name: str,
        condition: Mapping[str, Tensor],
        rows: list[int],
        concept_masks: ConceptMasks | None,
    ) -> dict[int, Tensor]:
        """The velocities of a condition that sampling did not evaluate at this step, by row of the batch.

        Only `rows` are evaluated, or all rows if `concept_masks` is to capture their attention.
        """
        if concept_masks is not None:
            rows = list(range(len(step.x_t)))
        if not rows:
            return {}
        velocity = velocities(
            self.model,
            step.x_t[rows],
            torch.tensor(step.t, device=self.model.device),
            {name: {keyword: value[rows] for keyword, value in condition.items()}},
            watch=concept_masks.watch if concept_masks else None,
        )[name]
        return dict(zip(rows, velocity, strict=True))

    def _noise_video(self, index: int) -> _Trajectory:
        """Takes points by adding noise to a given video, instead of sampling."""
        plan, model, request = self.plan, self.model, self.plan.requests[index]
        assert request.source is not None
        x_0 = read_latents(model, request.source, self.size)
        generator = random_generator(self.options.seed, "noise", index)
        timesteps = scheduler_for(model, self.options.num_inference_steps).timesteps
        conditions = {name: self._condition(name, [request]) for name in (request.baseline, PROMPT)}
        concept_masks = self._concept_masks([request])
        steps = plan.point_steps[index]
        captured_steps = [step for step in steps if plan.captures_attention(request, step)] or steps[-1:]
        points = []
        for step in steps:
            t = timesteps[step]
            noise = torch.randn(self.latent_shape, generator=generator)[None].to(x_0)
            x_t = model.add_noise(x_0, noise, t[None]).to(model.dtype)
            watch = concept_masks.watch if concept_masks and step in captured_steps else None
            v = velocities(model, x_t, t, conditions, watch=watch)
            points.append(_Point(float(t), x_t[0].cpu(), v[request.baseline][0].cpu(), v[PROMPT][0].cpu()))
        return _Trajectory(request.prompt, points, self._masks(concept_masks, 1)[0])

    def _condition(self, name: str, requests: Sequence[Request]) -> dict[str, Tensor]:
        """The batch of one condition: a row per request."""
        prompts = {
            NEGATIVE: [self.options.negative_prompt] * len(requests),
            PROMPT: [request.prompt for request in requests],
            INSTEAD: [request.instead or "" for request in requests],
        }[name]
        return stack_conditions([self.encoded[prompt].condition for prompt in prompts], self.model.device)

    def _concept_masks(self, requests: Sequence[Request]) -> ConceptMasks | None:
        if requests[0].group not in self.plan.masked_groups:
            return None
        tokens = [self.encoded[request.prompt].token_indices for request in requests]
        return ConceptMasks(PROMPT, tokens, self.options.mask_layers)

    def _masks(self, concept_masks: ConceptMasks | None, count: int) -> Sequence[Tensor | None]:
        """The mask of each of `count` trajectories."""
        if concept_masks is None:
            return [None] * count
        return concept_masks.masks(self.options.mask_threshold, self.token_grid).unbind()


def _stack_points(trajectories: Sequence[_Trajectory]) -> dict[str, Any]:
    points = [point for trajectory in trajectories for point in trajectory.points]
    masks = [mask for _, points, mask in trajectories for _ in points if mask is not None]
    return {
        "prompts": [trajectory.prompt for trajectory in trajectories for _ in trajectory.points],
        "x_t": torch.stack([point.x_t for point in points]),
        "t": torch.tensor([point.t for point in points]),
        "v_uncond": torch.stack([point.v_uncond for point in points]),
        "v_cond": torch.stack([point.v_cond for point in points]),
        "mask": torch.stack(masks) if masks else None,
    }
