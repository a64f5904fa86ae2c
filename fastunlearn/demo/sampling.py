"""Sampling from the demo's model, and watching on the way where it attends to a concept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from fastunlearn.capture import AttnMapsCapture
from fastunlearn.demo.model import PATCH, TOKEN_GRID, TextToVideo, build_scheduler
from fastunlearn.demo.world import FRAMES, HEIGHT, WIDTH
from fastunlearn.masks import get_mask

GUIDANCE = 2.5
STEPS = 12
MASK_THRESHOLD = 0.45
MASK_LAYER = "transformer_blocks.0.attn1"  # attends to a word where its object is; the later ones also around it


@dataclass(frozen=True)
class Step:
    """One step of sampling: where it stood, and what the model said there to each condition, all (B, F, 3, H, W)."""

    x_t: Tensor
    t: Tensor
    v_uncond: Tensor
    v_cond: Tensor
    v_other: Tensor  # empty where no other prompts were given
    x_next: Tensor


def starting_noise(count: int, seed: int) -> Tensor:
    """(count, F, 3, H, W) standard normal: the same seed gives the same noise on every device."""
    return torch.randn(count, FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(model: TextToVideo, x_t: Tensor, prompts: Sequence[str], other: Sequence[str] = ()) -> Iterator[Step]:
    """Samples with classifier-free guidance, step by step: the last step's `x_next` is the video.

    x_t: (B, F, 3, H, W) noise. The model is also asked what it would say to `other` prompts on the same way. All
    conditions go through it as one batch: the empty one, the prompts, the others.
    """
    scheduler = build_scheduler()
    scheduler.set_timesteps(STEPS, device=x_t.device)
    text = model.encode([*[""] * len(prompts), *prompts, *other])
    copies = len(text) // len(x_t)
    for now in scheduler.timesteps:
        t = now.expand(len(x_t))
        velocities = model.velocity(x_t.repeat(copies, 1, 1, 1, 1), t.repeat(copies), text).chunk(copies)
        guided = torch.lerp(velocities[0], velocities[1], GUIDANCE)
        x_next = scheduler.step(guided, now, x_t, return_dict=False)[0]
        yield Step(x_t, t, velocities[0], velocities[1], velocities[2] if other else x_t[:0], x_next)
        x_t = x_next


@dataclass(frozen=True)
class Samples:
    """Generated videos (B, F, 3, H, W), the steps on the way there, and masks (B, F, h, w): zeros without a concept."""

    videos: Tensor
    steps: list[Step]
    masks: Tensor


def sample(
    model: TextToVideo, prompts: Sequence[str], noise: Tensor, *, other: Sequence[str] = (), concept: str | None = None
) -> Samples:
    """One video a prompt, and what the model would have said to `other` prompts on the way.

    With `concept`, a word of either of each pair of prompts, also where the model attends to it. That is watched in the
    second half of the steps, once the objects have found their places.
    """
    maps: dict[str, Tensor] = {}
    steps: list[Step] = []
    with ExitStack() as stack:
        for step in denoise(model, noise, prompts, other):
            steps.append(step)
            if concept is not None and len(steps) == STEPS // 2:
                said = [*[""] * len(prompts), *prompts, *other]
                words = torch.tensor([model.token_indices(prompt, concept) or [-1] for prompt in said])
                stack.enter_context(AttnMapsCapture(model.transformer, maps, token_indices=words))
    if concept is None:
        return Samples(steps[-1].x_next, steps, torch.zeros(len(noise), *TOKEN_GRID, device=noise.device))
    # Rows without the word are zero.
    concept_map = maps[MASK_LAYER].unflatten(0, (-1, len(prompts))).sum(0)
    masks = get_mask({MASK_LAYER: concept_map}, None, MASK_THRESHOLD, HEIGHT, WIDTH, patch_size=PATCH)[MASK_LAYER]
    return Samples(steps[-1].x_next, steps, masks)
