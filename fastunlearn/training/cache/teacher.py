"""What the frozen model says at points of its trajectories, a unit of work at a time: what a teacher cache holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.erasers import erasers_disabled
from fastunlearn.families import attentions, find_transformer
from fastunlearn.training.cache.concept_masks import ConceptMasks
from fastunlearn.training.cache.plan import Plan, Unit, guidance_scale_of, video_size
from fastunlearn.training.data.requests import INSTEAD, NEGATIVE, PROMPT, Request, prompts_of
from fastunlearn.training.data.user_videos import read_latents
from fastunlearn.training.model.sampling import denoise, scheduler_for, stack_conditions, velocities
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
    """A frozen model with what it is to be asked.

    Attributes:
        plan: all trajectories, in units of work.
        prompts: every prompt that is used.
        size: height, width and num_frames of its videos.
        latent_shape: of their latents, without a batch.
        token_grid: (F, h, w) of their tokens.

    Raises:
        ValueError: a prompt is not encoded, the concept is in some prompts of a group only, or an option does not fit
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
        self.size = video_size(options, model.defaults)
        self.latent_shape = model.latent_shape(**self.size)
        self.token_grid = model.token_grid(self.latent_shape)
        self.prompts = prompts_of(requests, options.negative_prompt)
        missing = [prompt for prompt in self.prompts if prompt not in encoded]
        if missing:
            raise ValueError(f"encoded: expected every prompt and the negative prompt, {missing[0]!r} is missing")
        guidance_scale = guidance_scale_of(options, model.defaults)
        self.plan = Plan(requests, options, guidance_scale, self._masked_groups(requests))
        layers = len(attentions(find_transformer(model.experts[0])[0], model.family.text_attended))
        wrong = [layer for layer in options.mask_layers if not 0 <= layer < layers]
        if wrong:
            raise ValueError(f"mask_layers: expected layers from 0 to {layers - 1}, got {wrong}")

    def _masked_groups(self, requests: Sequence[Request]) -> set[str]:
        """The groups whose prompts have the concept."""
        masked = {request.group for request in requests if self.encoded[request.prompt].token_indices}
        for request in requests:
            if request.group in masked and not self.encoded[request.prompt].token_indices:
                raise ValueError(
                    f"concept: {self.options.concept!r} is in other prompts of group {request.group!r}, but not in "
                    f"{request.prompt!r}: a group has masks for all its points or for none"
                )
        return masked

    def points(self, unit: Unit) -> dict[str, Any]:
        """A unit's points, trajectory by trajectory: the arguments of `CacheWriter.write`."""
        with ExitStack() as stack:
            for expert in self.model.experts:
                stack.enter_context(erasers_disabled(expert))
            if unit.kind.source is None:
                return _stacked(self._sampled(unit))
            return _stacked([self._given(number) for number in unit.numbers])

    def _sampled(self, unit: Unit) -> list[_Trajectory]:
        plan, kind, seed = self.plan, unit.kind, self.options.seed
        requests = [plan.requests[number] for number in unit.numbers]
        generators = [random_generator(seed, "noise", number) for number in unit.numbers]
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        asked, besides = plan.everywhere(kind), plan.elsewhere(kind)
        conditions = {name: self._condition(name, requests) for name in (*asked, *([besides] if besides else []))}
        masks = self._concept_masks(requests)
        points: list[list[_Point]] = [[] for _ in requests]
        steps = denoise(
            self.model,
            noise,
            {name: conditions[name] for name in asked},
            follow=kind.follow,
            guide_from=NEGATIVE,
            guidance_scale=plan.guidance_scale,
            num_inference_steps=self.options.num_inference_steps,
            generators=generators,
            watch=lambda step: masks.watch if masks and plan.is_watched(kind, step) else None,
        )
        for step in steps:
            rows = [row for row, number in enumerate(unit.numbers) if step.index in plan.chosen[number]]
            said = {name: dict(zip(rows, velocity[rows], strict=True)) for name, velocity in step.velocities.items()}
            is_watched = plan.is_watched(kind, step.index) and besides == PROMPT
            if besides and (rows or is_watched):
                # Where the words' attention is to be seen, every sample's is.
                these = list(range(len(requests))) if is_watched else rows
                found = velocities(
                    self.model,
                    step.x_t[these],
                    torch.tensor(step.t, device=self.model.device),
                    {besides: {key: value[these] for key, value in conditions[besides].items()}},
                    watch=masks.watch if masks and is_watched else None,
                )
                said[besides] = dict(zip(these, found[besides], strict=True))
            for row in rows:
                x_t, v_uncond, v_cond = step.x_t[row], said[kind.without][row], said[PROMPT][row]
                points[row].append(_Point(step.t, x_t.cpu(), v_uncond.cpu(), v_cond.cpu()))
        of_each = masks.masks(self.options.mask_threshold, self.token_grid) if masks else [None] * len(requests)
        return [
            _Trajectory(request.prompt, its_points, mask)
            for request, its_points, mask in zip(requests, points, of_each, strict=True)
        ]

    def _given(self, number: int) -> _Trajectory:
        """Points between a given video and noise."""
        plan, model, request = self.plan, self.model, self.plan.requests[number]
        assert request.source is not None
        x_0 = read_latents(model, request.source, self.latent_shape, **self.size)
        generator = random_generator(self.options.seed, "noise", number)
        timesteps = scheduler_for(model, self.options.num_inference_steps).timesteps
        conditions = {name: self._condition(name, [request]) for name in (request.without, PROMPT)}
        masks = self._concept_masks([request])
        chosen = plan.chosen[number]
        watched = [step for step in chosen if plan.is_watched(request, step)] or chosen[-1:]
        points = []
        for step in chosen:
            t = timesteps[step]
            noise = torch.randn(self.latent_shape, generator=generator)[None].to(x_0)
            x_t = model.add_noise(x_0, noise, t[None]).to(model.dtype)
            said = velocities(model, x_t, t, conditions, watch=masks.watch if masks and step in watched else None)
            points.append(_Point(float(t), x_t[0].cpu(), said[request.without][0].cpu(), said[PROMPT][0].cpu()))
        mask = masks.masks(self.options.mask_threshold, self.token_grid)[0] if masks else None
        return _Trajectory(request.prompt, points, mask)

    def _condition(self, name: str, requests: Sequence[Request]) -> dict[str, Tensor]:
        prompts = {
            NEGATIVE: [self.options.negative_prompt] * len(requests),
            PROMPT: [request.prompt for request in requests],
            INSTEAD: [request.instead or "" for request in requests],
        }[name]
        return stack_conditions([self.encoded[prompt].condition for prompt in prompts], self.model.device)

    def _concept_masks(self, requests: Sequence[Request]) -> ConceptMasks | None:
        if requests[0].group not in self.plan.masked:
            return None
        tokens = [self.encoded[request.prompt].token_indices for request in requests]
        return ConceptMasks(PROMPT, tokens, self.options.mask_layers)


def _stacked(trajectories: Sequence[_Trajectory]) -> dict[str, Any]:
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
