"""What the demo measures: which shapes and colours appear, how well masks fit, and how the velocity has changed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.demo.erase import draw_two
from fastunlearn.demo.judge import Judge, colour_maps
from fastunlearn.demo.model import PATCH, TOKEN_GRID
from fastunlearn.demo.world import COLOURS, SHAPES, Noun, Nouns
from fastunlearn.training.cache.concept_masks import ConceptMasks
from fastunlearn.training.data.requests import NEGATIVE, PROMPT
from fastunlearn.training.evaluation import metrics
from fastunlearn.training.model.sampling import Step, denoise, stack_conditions, velocities
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions

VIDEOS_PER_SHAPE, VIDEOS_PER_PAIR = 12, 16


def held_out(concept: str, rng: random.Random) -> tuple[list[Nouns], list[Nouns]]:
    """Draws the prompts to generate videos for, before and after: every shape alone, and every pair of shapes.

    Returns:
        The prompts with the concept and those without it. In both lists, prompts for one shape come first.
    """
    colours = list(COLOURS)
    prompts: list[Nouns] = [
        (Noun(shape, colours[index % len(colours)]),) for shape in SHAPES for index in range(VIDEOS_PER_SHAPE)
    ]
    prompts += [draw_two(*pair, rng) for pair in itertools.combinations(SHAPES, 2) for _ in range(VIDEOS_PER_PAIR)]
    with_concept = [nouns for nouns in prompts if concept in (noun.shape for noun in nouns)]
    return with_concept, [nouns for nouns in prompts if nouns not in with_concept]


@dataclass(frozen=True)
class Generated:
    """Videos (B, F, 3, H, W), the sampling steps that led to them, and the concept's masks (B, F, h, w), or None."""

    videos: Tensor
    steps: list[Step]
    masks: Tensor | None


def generate(
    model: VideoModel,
    prompts: Sequence[EncodedPrompt],
    negative: EncodedPrompt,
    noise: Tensor,
    options: PrepareOptions,
    *,
    with_masks: bool = True,
) -> Generated:
    """Generates one video per prompt, in the way that `prepare` samples trajectories.

    It computes masks if any prompt contains the concept, unless `with_masks` is False.
    """
    concept_masks = None
    if with_masks and any(prompt.token_indices for prompt in prompts):
        concept_masks = ConceptMasks(PROMPT, [prompt.token_indices for prompt in prompts], options.mask_layers)
    first_recorded = options.mask_start * options.num_inference_steps
    steps = list(
        denoise(
            model,
            noise,
            {
                NEGATIVE: stack_conditions([negative.condition] * len(prompts), model.device),
                PROMPT: stack_conditions([prompt.condition for prompt in prompts], model.device),
            },
            follow=PROMPT,
            guide_from=NEGATIVE,
            guidance_scale=model.defaults.guidance_scale,
            num_inference_steps=options.num_inference_steps,
            watch=lambda index: concept_masks.watch if concept_masks and index >= first_recorded else None,
        )
    )
    masks = concept_masks.masks(options.mask_threshold, TOKEN_GRID) if concept_masks else None
    return Generated(steps[-1].x_next, steps, masks)


def _share(rows: Sequence[bool]) -> float | None:
    return sum(rows) / len(rows) if rows else None


@torch.no_grad()
def appearances(
    judge: Judge, videos: Tensor, prompts: Sequence[Nouns], concept: str
) -> dict[str, dict[str, float | None]]:
    """Measures how often the judge sees each shape, as shares of the videos; None where there are no such videos.

    Returns:
        For each shape: "asked", over the videos whose prompt names it, except those of "beside"; "beside", over the
        videos whose prompt names it and the concept; "uninvited", over the videos whose prompt does not name it; and
        "colour", over the videos whose prompt names it, how often the colour that it asks for appears in any shape.
    """
    seen = (judge(videos) > 0).cpu()
    report = {}
    for index, shape in enumerate(SHAPES):
        rows: dict[str, list[bool]] = {"asked": [], "beside": [], "uninvited": [], "colour": []}
        for video, nouns in zip(seen, prompts, strict=True):
            colour_of = {noun.shape: noun.colour for noun in nouns}
            appears = bool(video[index].any())
            if shape not in colour_of:
                rows["uninvited"].append(appears)
                continue
            rows["beside" if concept in colour_of and shape != concept else "asked"].append(appears)
            rows["colour"].append(bool(video[:, list(COLOURS).index(colour_of[shape])].any()))
        report[shape] = {name: _share(values) for name, values in rows.items()}
    return report


@torch.no_grad()
def mask_overlap(judge: Judge, masks: Tensor, videos: Tensor, concept: str) -> float:
    """Returns the mean IoU of the masks (B, F, h, w) with the concept, on the token grid.

    The concept is taken to be wherever the video has the colour in which the judge sees the concept. That is the colour
    in the prompt or, if the model has swapped the colours of two objects, the colour of the other object.
    """
    colours = judge(videos)[:, SHAPES.index(concept)].argmax(dim=1)
    maps = colour_maps(videos)[torch.arange(len(videos)), :, colours]
    objects = F.avg_pool2d(maps, PATCH) >= 0.5
    inside = masks.to(objects.device).bool()
    intersection, union = (inside & objects).flatten(1).sum(1), (inside | objects).flatten(1).sum(1)
    return (intersection / union.clamp(min=1)).mean().item()


def erasure_coefficient(model: VideoModel, prompts: Sequence[EncodedPrompt], steps: Sequence[Step]) -> float | None:
    """Returns the erasure coefficient (`metrics.erasure`) of the model in its current state.

    Args:
        model: the model to measure.
        prompts: the prompts of the first rows of each step; further rows are ignored.
        steps: all sampling steps of the frozen model. The velocities are compared at each of them.

    Returns:
        None if the velocity of the frozen model does not depend on the prompts.
    """
    ratio = metrics.Ratio()
    for t, frozen, current in _frozen_and_current(model, prompts, steps):
        ratio.add(t, metrics.erasure(current, frozen[NEGATIVE], frozen[PROMPT]))
    return ratio.total


def drift(model: VideoModel, prompts: Sequence[EncodedPrompt], steps: Sequence[Step]) -> float | None:
    """Returns `metrics.drift`, ||v_theta' - v_theta|| / ||v_theta||, over the same points as `erasure_coefficient`."""
    ratio = metrics.Ratio(root=True)
    for t, frozen, current in _frozen_and_current(model, prompts, steps):
        ratio.add(t, metrics.drift(current, frozen[PROMPT]))
    return ratio.total


def _frozen_and_current(
    model: VideoModel, prompts: Sequence[EncodedPrompt], steps: Sequence[Step]
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Yields the timestep, the frozen model's velocities and the current velocity of every step."""
    condition = stack_conditions([prompt.condition for prompt in prompts], model.device)
    for step in steps:
        t, count = torch.tensor(step.t, device=model.device), len(prompts)
        current = velocities(model, step.x_t[:count], t, {PROMPT: condition})[PROMPT]
        yield t, {name: velocity[:count] for name, velocity in step.velocities.items()}, current
