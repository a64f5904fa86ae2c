"""Sampling from a frozen model, step by step, and seeing what it says on the way."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.random_numbers import random_generator
from fastunlearn.velocity_model import VelocityModel

Conditions = Mapping[str, Mapping[str, Tensor]]
Watch = Callable[[VelocityModel, Sequence[str]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Step:
    """One step of sampling.

    Attributes:
        index: counted from 0.
        t: the timestep, 0 to 1000.
        x_t: (B, ...) where it stood, as the model saw it, in its dtype.
        velocities: (B, ...) what the model said to each condition there, in its dtype.
        x_next: (B, ...) where the guided velocity leads: after the last step the latents of the video.
    """

    index: int
    t: float
    x_t: Tensor
    velocities: dict[str, Tensor]
    x_next: Tensor


def stack_conditions(conditions: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Single prompts' conditions as one batch on `device`.

    Raises:
        ValueError: they differ in shape.
    """
    for keyword in conditions[0]:
        shapes = {tuple(condition[keyword].shape) for condition in conditions}
        if len(shapes) > 1:
            raise ValueError(f"conditions: expected {keyword} of one shape in a batch, got {sorted(shapes)}")
    return {name: torch.stack([condition[name] for condition in conditions]).to(device) for name in conditions[0]}


def scheduler_for(model: VideoModel, num_inference_steps: int) -> Any:
    """A copy of the model's scheduler, with its timesteps set as the family's pipeline sets them.

    Raises:
        ValueError: `num_inference_steps` is not positive.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: expected a positive number, got {num_inference_steps}")
    scheduler = copy.deepcopy(model.scheduler)
    model.family.set_timesteps(scheduler, num_inference_steps, model.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks for the first timestep's index and waits for the GPU
    return scheduler


@torch.no_grad()
def velocities(
    model: VideoModel,
    x_t: Tensor,
    t: Tensor,
    conditions: Conditions,
    *,
    one_at_a_time: bool = False,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """What the model says at x_t to each condition, all (B, ...) in its dtype.

    The conditions go through it as one batch, in their order; one after the other where their shapes differ.

    Args:
        model: the frozen model.
        x_t: (B, ...) noisy latents.
        t: one timestep for all of them.
        conditions: by name, with a batch of B.
        one_at_a_time: a condition at a time, for less memory.
        watch: `watch(expert, names)` is entered around each forward pass; its batch is that of `names`, B rows each.
    """
    expert = model.experts[model.expert_index(float(t))]
    shapes = {tuple((key, value.shape) for key, value in condition.items()) for condition in conditions.values()}
    names = list(conditions)
    forwards = [[name] for name in names] if one_at_a_time or len(shapes) > 1 else [names]
    found: dict[str, Tensor] = {}
    x_t = x_t.to(model.dtype)
    for together in forwards:
        batched = {key: torch.cat([conditions[name][key] for name in together]) for key in conditions[together[0]]}
        with watch(expert, together) if watch else nullcontext():
            said = expert(x_t.repeat(len(together), *[1] * (x_t.dim() - 1)), t, batched)
        found |= zip(together, said.chunk(len(together)), strict=True)
    return found


@torch.no_grad()
def denoise(
    model: VideoModel,
    noise: Tensor,
    conditions: Conditions,
    *,
    follow: str,
    guide_from: str | None = None,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
    generators: Sequence[torch.Generator] | None = None,
    one_at_a_time: bool = False,
    watch: Callable[[int], Watch | None] | None = None,
) -> Iterator[Step]:
    """Samples with classifier-free guidance: the last step's `x_next` are the latents that the pipeline would give.

    The guided velocity is u + guidance_scale * (c - u), with c that of `follow` and u that of `guide_from`, in float32.
    Latents between the steps are float32 too, but for CogVideoX, whose pipeline keeps them in the model's dtype.

    Args:
        model: to sample from.
        noise: (B, ...) standard normal.
        conditions: by name, with a batch of B; the model is asked all of them at every step.
        follow: which of them to be led towards.
        guide_from: which of them to be led away from; not needed at a guidance scale of 1.
        guidance_scale: of classifier-free guidance; 1 for none.
        num_inference_steps: steps.
        generators: one a sample, for schedulers that add noise on the way (CogVideoX's DPM). By default they are seeded
            with the samples' numbers.
        one_at_a_time: see `velocities`.
        watch: from the number of a step to what watches its forward passes, see `velocities`.

    Raises:
        ValueError: `follow` or `guide_from` is not among the conditions, or the number of steps is not positive.
    """
    needed = [follow] if guidance_scale == 1 else [follow, guide_from]
    for argument, name in zip(("follow", "guide_from"), needed, strict=False):
        if name not in conditions:
            raise ValueError(f"{argument}: expected one of {', '.join(map(repr, conditions))}; got {name!r}")
    scheduler = scheduler_for(model, num_inference_steps)
    advance = _advance(scheduler, generators or [random_generator(sample) for sample in range(len(noise))])
    x_t = noise.to(model.device, torch.float32 if model.family.float32_latents else model.dtype)
    for index, t in enumerate(scheduler.timesteps):
        watched = watch(index) if watch else None
        said = velocities(model, x_t, t, conditions, one_at_a_time=one_at_a_time, watch=watched)
        guided = said[follow].float()
        if guidance_scale != 1 and guide_from is not None:
            away = said[guide_from].float()
            guided = away + guidance_scale * (guided - away)
        x_next = advance(guided, index, x_t).to(x_t.dtype)
        yield Step(index, float(t), x_t.to(model.dtype), said, x_next)
        x_t = x_next


def _advance(scheduler: Any, generators: Sequence[torch.Generator]) -> Callable[[Tensor, int, Tensor], Tensor]:
    """(velocity, number of the step, x_t) to x at the next timestep."""
    timesteps = scheduler.timesteps
    if "old_pred_original_sample" not in inspect.signature(scheduler.step).parameters:
        return lambda velocity, index, x_t: scheduler.step(velocity, timesteps[index], x_t, return_dict=False)[0]
    # CogVideoX's DPM scheduler has its caller remember what the last step found.
    found: Tensor | None = None

    def advance(velocity: Tensor, index: int, x_t: Tensor) -> Tensor:
        nonlocal found
        before = timesteps[index - 1] if index else None
        x_next, found = scheduler.step(
            velocity, found, timesteps[index], before, x_t, generator=list(generators), return_dict=False
        )
        return x_next

    return advance
