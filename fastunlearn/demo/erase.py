"""Erasing a concept from the demo's model: a cache of what the frozen model says, and the training of the erasers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastunlearn.backbones import as_velocity_model
from fastunlearn.capture import EraserOutputsCapture
from fastunlearn.demo.model import TextToVideo
from fastunlearn.demo.sampling import sample
from fastunlearn.demo.world import COLOURS, SHAPES, Noun, prompt_of
from fastunlearn.erasers import attach_erasers
from fastunlearn.functional import LowRankOutput
from fastunlearn.losses import T2VUnlearningLoss

RANK = 64
STEPS = 240
TARGETS_A_STEP, KEPT_A_STEP = 20, 4
LEADING_STEPS = 6  # of sampling towards the concept, at which the erased model still can turn away
MATRICES_LEARNING_RATE = 3e-2  # with Muon: half the steps that AdamW needs to the same loss
BIASES_LEARNING_RATE = 1e-2
# How far beyond what stands for the concept the target lies. Beside another shape most of the way leads to its place.
ETA_ALONE, ETA_BESIDE = 1.0, 0.1
UNLEARNING_WEIGHT, PRESERVATION_WEIGHT, LOCALIZATION_WEIGHT = 1.0, 1.0, 0.003
ALONE_TRAJECTORIES, BESIDE_TRAJECTORIES, KEPT_TRAJECTORIES = 12, 40, 24
LEADING_TRAJECTORIES = 8  # for either kind of target, besides


@dataclass(frozen=True)
class Cache:
    """What the frozen model said at K points of its trajectories.

    x_t, v_cond, v_uncond: (K, F, 3, H, W). t: (K,). text: (K, L, D), the condition of v_cond. mask: (K, F, h, w), 1 on
    the concept.
    """

    x_t: Tensor
    t: Tensor
    text: Tensor
    v_cond: Tensor
    v_uncond: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.x_t)

    def rows(self, index: Tensor) -> Cache:
        """The points chosen by `index`."""
        return Cache(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def joined(caches: Sequence[Cache]) -> Cache:
        """All points of several caches."""
        return Cache(*(torch.cat([getattr(cache, field.name) for cache in caches]) for field in fields(Cache)))


def one(shape: str, draw: random.Random) -> tuple[Noun, ...]:
    """A request for one shape in any colour."""
    return (Noun(shape, draw.choice(list(COLOURS))),)


def two(first: str, second: str, draw: random.Random) -> tuple[Noun, ...]:
    """A request for two shapes, in different colours and either order."""
    nouns = [Noun(shape, colour) for shape, colour in zip((first, second), draw.sample(list(COLOURS), 2), strict=True)]
    draw.shuffle(nouns)
    return tuple(nouns)


def target_cache(
    model: TextToVideo, concept: str, noise: Tensor, draw: random.Random, *, alone: bool, leading: bool
) -> Cache:
    """Points at which the concept is asked for, `alone` or beside another shape.

    They lie on the way to the concept (`leading`) or to what stands for it: the erased model must turn away both where
    the frozen model would go and where it itself will go. What stands for the concept, and gives `v_uncond`, is the
    rest of the prompt. Where nothing is left it is any other shape: half of all videos show the concept, so that the
    empty prompt would bring it back.
    """
    others = [shape for shape in SHAPES if shape != concept]
    asked, instead = [], []
    for index in range(len(noise)):
        nouns = one(concept, draw) if alone else two(concept, others[index % 2], draw)
        rest = tuple(noun for noun in nouns if noun.shape != concept)
        asked.append(prompt_of(nouns))
        instead.append(prompt_of(rest or one(others[index % 2], draw)))
    followed, other = (asked, instead) if leading else (instead, asked)
    samples = sample(model, followed, noise, other=other, concept=concept)
    text, mask = model.encode(asked), samples.masks
    points = []
    for step in samples.steps[: LEADING_STEPS if leading else None]:
        v_asked, v_instead = (step.v_cond, step.v_other) if leading else (step.v_other, step.v_cond)
        points.append(Cache(step.x_t, step.t, text, v_asked, v_instead, mask))
    return Cache.joined(points)


def kept_cache(model: TextToVideo, concept: str, noise: Tensor, draw: random.Random) -> Cache:
    """Points at which only other shapes are asked for, or nothing in particular. No mask."""
    first, second = (shape for shape in SHAPES if shape != concept)
    requests = [
        two(first, second, draw) if index % 2 == 0 else one((first, second)[index // 2 % 2], draw)
        for index in range(len(noise))
    ]
    prompts = [prompt_of(nouns) for nouns in requests]
    text, empty = model.encode(prompts), model.encode([""] * len(noise))
    samples = sample(model, prompts, noise)
    points = []
    for index, step in enumerate(samples.steps):
        points.append(Cache(step.x_t, step.t, text, step.v_cond, step.v_uncond, samples.masks))
        if index % 4 == 0:
            points.append(Cache(step.x_t, step.t, empty, step.v_uncond, step.v_uncond, samples.masks))
    return Cache.joined(points)


def learning_rate_factor(step: int) -> float:
    """Trapezoid: a short rise to 1, a plateau, a straight fall to zero over the second half."""
    return min(1.0, (step + 1) / 10, 2 * (STEPS - step) / STEPS)


def train_erasers(
    model: TextToVideo, alone: Cache, beside: Cache, kept: Cache, seed: int
) -> Iterator[dict[str, float]]:
    """Attaches erasers and trains them with all three terms of `T2VUnlearningLoss`. Yields the losses of every step."""
    torch.manual_seed(seed)
    device = kept.x_t.device
    generator = torch.Generator().manual_seed(seed)
    erasers = attach_erasers(model.transformer, rank=RANK)
    velocity = as_velocity_model(model.transformer)
    loss_alone, loss_beside = (
        T2VUnlearningLoss(
            model.scheduler.alphas_cumprod,
            UNLEARNING_WEIGHT,
            PRESERVATION_WEIGHT,
            LOCALIZATION_WEIGHT,
            guidance_scale=eta,
            channel_dim=2,
            normalization="background_mean",
        )
        for eta in (ETA_ALONE, ETA_BESIDE)
    )
    parameters = [parameter for eraser in erasers.values() for parameter in eraser.parameters()]
    optimizers = [
        torch.optim.Muon(
            [parameter for parameter in parameters if parameter.ndim == 2],
            lr=MATRICES_LEARNING_RATE,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.ndim == 1], lr=BIASES_LEARNING_RATE),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor) for optimizer in optimizers]
    outputs: dict[str, LowRankOutput] = {}
    for step in range(STEPS):
        loss_fn, targets = (loss_alone, alone) if step % 4 == 0 else (loss_beside, beside)
        target = targets.rows(torch.randint(len(targets), (TARGETS_A_STEP,), generator=generator).to(device))
        keep = kept.rows(torch.randint(len(kept), (KEPT_A_STEP,), generator=generator).to(device))
        with EraserOutputsCapture(velocity, erasers, outputs, low_rank=True):
            loss, terms = loss_fn(
                None,
                velocity,
                target.x_t,
                target.t,
                target.text,
                keep.text,
                localization_mask=target.mask,
                eraser_outputs=outputs,
                v_uncond=target.v_uncond,
                v_cond=target.v_cond,
                v_preserve=keep.v_cond,
                x_t_preserve=keep.x_t,
                t_preserve=keep.t,
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        yield {name: value.item() for name, value in terms.items() if name == "total_loss" or "weighted" in name}
