"""Sampling from a model: step by step, with access to its velocities at every step, or a whole video."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastunlearn.families import Condition
from fastunlearn.files import one_line, shown
from fastunlearn.training.model.video_model import VideoModel, VideoSize
from fastunlearn.training.random_numbers import random_generator
from fastunlearn.velocity_model import VelocityModel

Conditions = Mapping[str, Condition]  # by name
# (expert, names of the conditions in the batch) -> a context manager entered around the forward pass.
Watch = Callable[[VelocityModel, Sequence[str]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Step:
    """One sampling step.

    Attributes:
        index: the number of the step, from 0.
        t: the timestep, 0 to 1000.
        x_t: (B, ...) the noisy latents before the step, in the model's dtype.
        velocities: the model's velocity (B, ...) at x_t for each condition, by name, in the model's dtype.
        x_next: (B, ...) the latents after the step. After the last step these are the video's latents.
    """

    index: int
    t: float
    x_t: Tensor
    velocities: dict[str, Tensor]
    x_next: Tensor


def stack_conditions(conditions: Sequence[Condition], device: torch.device) -> dict[str, Tensor]:
    """Stacks the conditions of single prompts into a batch, on `device`.

    Raises:
        ValueError: the conditions differ in shape.
    """
    for keyword in conditions[0]:
        shapes = {tuple(condition[keyword].shape) for condition in conditions}
        if len(shapes) > 1:
            raise ValueError(f"conditions: expected {keyword} of one shape in a batch, got {sorted(shapes)}")
    return {name: torch.stack([condition[name] for condition in conditions]).to(device) for name in conditions[0]}


def scheduler_for(model: VideoModel, num_inference_steps: int) -> Any:
    """A copy of the model's scheduler with its timesteps set, in the way the family's pipeline sets them.

    Raises:
        ValueError: `num_inference_steps` is not positive.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: expected a positive number, got {num_inference_steps}")
    scheduler = copy.deepcopy(model.scheduler)
    model.family.set_timesteps(scheduler, num_inference_steps, model.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise it searches for the first timestep, which synchronises with the GPU
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
    """The model's velocity at x_t for each condition, by name: (B, ...) in the model's dtype.

    All conditions go through the model in one batch. If their shapes differ, each has a forward pass of its own.

    Args:
        model: the frozen model.
        x_t: (B, ...) noisy latents.
        t: one timestep for all of them.
        conditions: by name, each with a batch of B.
        one_at_a_time: always give each condition a forward pass of its own, which takes less memory.
        watch: `watch(expert, names)` is entered around each forward pass. The batch of that pass consists of B rows for
            each of the conditions `names`, in their order.
    """
    expert = model.experts[model.expert_index(float(t))]
    shapes = {tuple((key, value.shape) for key, value in condition.items()) for condition in conditions.values()}
    names = list(conditions)
    passes = [[name] for name in names] if one_at_a_time or len(shapes) > 1 else [names]
    by_name: dict[str, Tensor] = {}
    x_t = x_t.to(model.dtype)
    for batch_names in passes:
        keywords = conditions[batch_names[0]]
        batch = {keyword: torch.cat([conditions[name][keyword] for name in batch_names]) for keyword in keywords}
        with watch(expert, batch_names) if watch else nullcontext():
            velocity = expert(x_t.repeat(len(batch_names), *[1] * (x_t.dim() - 1)), t, batch)
        by_name |= zip(batch_names, velocity.chunk(len(batch_names)), strict=True)
    return by_name


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
    """Samples with classifier-free guidance. The last step's `x_next` equals the latents that the pipeline would give.

    The guided velocity is u + guidance_scale * (c - u), computed in float32, where c is the velocity for `follow` and u
    the one for `guide_from`. Latents stay in float32 between steps, except for families whose pipeline rounds them to
    the model's dtype (CogVideoX).

    Args:
        model: the model to sample from.
        noise: (B, ...) standard normal.
        conditions: by name, each with a batch of B. The model computes a velocity for all of them at every step.
        follow: the name of the condition to guide towards.
        guide_from: the name of the condition to guide away from; not read at a guidance scale of 1.
        guidance_scale: classifier-free guidance scale; 1 for no guidance.
        num_inference_steps: number of sampling steps.
        generators: one per sample, for schedulers that add noise at every step (CogVideoX's DPM). By default sample i
            has a generator seeded with i.
        one_at_a_time: as in `velocities`.
        watch: number of a step -> the `watch` argument of `velocities` at that step.

    Raises:
        ValueError: `follow` or `guide_from` is not among the conditions, or the number of steps is not positive.
    """
    needed = [follow] if guidance_scale == 1 else [follow, guide_from]
    for argument, name in zip(("follow", "guide_from"), needed, strict=False):
        if name not in conditions:
            expected = one_line(", ".join(map(shown, conditions)))
            raise ValueError(f"{argument}: expected one of {expected}, got {shown(name)}")
    scheduler = scheduler_for(model, num_inference_steps)
    advance = _advance(scheduler, generators or [random_generator(sample) for sample in range(len(noise))])
    x_t = noise.to(model.device, torch.float32 if model.family.float32_latents else model.dtype)
    for index, t in enumerate(scheduler.timesteps):
        watched = watch(index) if watch else None
        by_name = velocities(model, x_t, t, conditions, one_at_a_time=one_at_a_time, watch=watched)
        velocity = by_name[follow].float()
        if guidance_scale != 1 and guide_from is not None:
            start = by_name[guide_from].float()
            velocity = start + guidance_scale * (velocity - start)
        x_next = advance(velocity, index, x_t).to(x_t.dtype)
        yield Step(index, float(t), x_t.to(model.dtype), by_name, x_next)
        x_t = x_next


def video(
    model: VideoModel,
    conditions: Mapping[str, Condition],
    size: VideoSize,
    *,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    bar: Any = None,
) -> Tensor:
    """Samples one video: (F, 3, H, W) in [0, 1], on the CPU.

    Args:
        model: a model loaded with its VAE.
        conditions: the conditions of the "prompt" and of the "negative" prompt, without a batch dimension.
        size: one that the model's `latent_shape` accepts.
        seed: the seed of the initial noise, which is drawn in float32 on the CPU to be the same on every device.
        num_inference_steps: number of sampling steps.
        guidance_scale: classifier-free guidance scale; 1 samples without guidance, from the prompt alone.
        bar: a progress bar (tqdm) to advance by 1 per step.

    Raises:
        FloatingPointError: the latents are not finite. Decoded, they would just be a black video.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, *model.latent_shape(*size), generator=generator)
    needed = ["prompt"] if guidance_scale == 1 else ["prompt", "negative"]
    for step in denoise(
        model,
        latents,
        {name: stack_conditions([conditions[name]], model.device) for name in needed},
        follow="prompt",
        guide_from="negative",
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generators=[generator],
    ):
        latents = step.x_next
        if bar is not None:
            bar.update()
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"video: expected finite latents, got NaN or infinity after {num_inference_steps} sampling steps; "
            f"the model overflows in {model.dtype}, or guidance or the erasers are too strong"
        )
    return model.decode(latents, size.num_frames)[0]


def _advance(scheduler: Any, generators: Sequence[torch.Generator]) -> Callable[[Tensor, int, Tensor], Tensor]:
    """The scheduler's step as a function: (velocity, number of the step, x_t) -> x at the next timestep."""
    timesteps = scheduler.timesteps
    if "old_pred_original_sample" not in inspect.signature(scheduler.step).parameters:
        return lambda velocity, index, x_t: scheduler.step(velocity, timesteps[index], x_t, return_dict=False)[0]
    # With CogVideoX's DPM scheduler, the caller has to pass on the clean sample that the previous step predicted.
    last_x_0: Tensor | None = None

    def advance(velocity: Tensor, index: int, x_t: Tensor) -> Tensor:
        nonlocal last_x_0
        last_t = timesteps[index - 1] if index else None
        x_next, last_x_0 = scheduler.step(
            velocity, last_x_0, timesteps[index], last_t, x_t, generator=list(generators), return_dict=False
        )
        return x_next

    return advance
