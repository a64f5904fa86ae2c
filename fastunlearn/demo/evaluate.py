"""What the demo reports: who appears, in which colour, how well masks fit, and how the velocity has turned."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.demo.erase import two
from fastunlearn.demo.judge import Judge, colour_maps
from fastunlearn.demo.model import PATCH, TOKEN_GRID
from fastunlearn.demo.world import COLOURS, SHAPES, Noun
from fastunlearn.training.cache.concept_masks import ConceptMasks
from fastunlearn.training.data.requests import NEGATIVE, PROMPT
from fastunlearn.training.evaluation import metrics
from fastunlearn.training.model.sampling import Step, denoise, stack_conditions, velocities
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions

VIDEOS_A_SHAPE, VIDEOS_A_PAIR = 12, 16

Asked = tuple[Noun, ...]


def held_out(concept: str, draw: random.Random) -> tuple[list[Asked], list[Asked]]:
    """What is asked for before and after: every shape alone, and every pair. Those with the concept, and the others.

    In either list what asks for one shape comes first.
    """
    colours = list(COLOURS)
    drawn: list[Asked] = [
        (Noun(shape, colours[index % len(colours)]),) for shape in SHAPES for index in range(VIDEOS_A_SHAPE)
    ]
    drawn += [two(*pair, draw) for pair in itertools.combinations(SHAPES, 2) for _ in range(VIDEOS_A_PAIR)]
    asking = [asked for asked in drawn if concept in (noun.shape for noun in asked)]
    return asking, [asked for asked in drawn if asked not in asking]


@dataclass(frozen=True)
class Generated:
    """Videos (B, F, 3, H, W), the steps on the way there, and where the concept is: masks (B, F, h, w), or None."""

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
    """One video a prompt, sampled as the teacher cache's trajectories are; with masks if prompts have the concept."""
    watched = None
    if with_masks and any(prompt.token_indices for prompt in prompts):
        watched = ConceptMasks(PROMPT, [prompt.token_indices for prompt in prompts], options.mask_layers)
    first_watched = options.mask_start * options.num_inference_steps
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
            watch=lambda index: watched.watch if watched and index >= first_watched else None,
        )
    )
    masks = watched.masks(options.mask_threshold, TOKEN_GRID) if watched else None
    return Generated(steps[-1].x_next, steps, masks)


def _share(rows: Sequence[bool]) -> float | None:
    return sum(rows) / len(rows) if rows else None


@torch.no_grad()
def appearances(
    judge: Judge, videos: Tensor, asked: Sequence[Asked], concept: str
) -> dict[str, dict[str, float | None]]:
    """For every shape, the share of videos in which the judge sees it: when asked for, beside the concept, uninvited.

    "asked" is over all videos that ask for it but for those that "beside" is over: where the concept is asked for too.
    "colour" is how often the colour that it was asked for in is there, in whatever shape.
    """
    seen = (judge(videos) > 0).cpu()
    report = {}
    for index, shape in enumerate(SHAPES):
        rows: dict[str, list[bool]] = {"asked": [], "beside": [], "uninvited": [], "colour": []}
        for video, nouns in zip(seen, asked, strict=True):
            shapes = {noun.shape: noun.colour for noun in nouns}
            there = bool(video[index].any())
            if shape not in shapes:
                rows["uninvited"].append(there)
                continue
            rows["beside" if concept in shapes and shape != concept else "asked"].append(there)
            rows["colour"].append(bool(video[:, list(COLOURS).index(shapes[shape])].any()))
        report[shape] = {name: _share(values) for name, values in rows.items()}
    return report


@torch.no_grad()
def mask_overlap(judge: Judge, masks: Tensor, videos: Tensor, concept: str) -> float:
    """Mean IoU of the masks, (B, F, h, w), with the object that the judge takes for the concept, on the token grid.

    The object is what has the colour in which the judge sees the concept: the one that was asked for, or, where the
    model mixed two objects' colours up, the other's.
    """
    colours = judge(videos)[:, SHAPES.index(concept)].argmax(dim=1)
    maps = colour_maps(videos)[torch.arange(len(videos)), :, colours]
    objects = F.avg_pool2d(maps, PATCH) >= 0.5
    inside = masks.to(objects.device).bool()
    common, either = (inside & objects).flatten(1).sum(1), (inside | objects).flatten(1).sum(1)
    return (common / either.clamp(min=1)).mean().item()


def erasure_coefficient(model: VideoModel, prompts: Sequence[EncodedPrompt], steps: Sequence[Step]) -> float | None:
    """`metrics.erasure` of the model as it is, over all points of the frozen model's trajectories.

    `steps` may have more rows than there are prompts: the first ones count. None where prompts say nothing.
    """
    ratio = metrics.Ratio()
    for t, frozen, now in _now_and_then(model, prompts, steps):
        ratio.add(t, metrics.erasure(now, frozen[NEGATIVE], frozen[PROMPT]))
    return ratio.total


def drift(model: VideoModel, prompts: Sequence[EncodedPrompt], steps: Sequence[Step]) -> float | None:
    """`metrics.drift`, likewise: ||v_theta' - v_theta|| / ||v_theta||."""
    ratio = metrics.Ratio(root=True)
    for t, frozen, now in _now_and_then(model, prompts, steps):
        ratio.add(t, metrics.drift(now, frozen[PROMPT]))
    return ratio.total


def _now_and_then(
    model: VideoModel, prompts: Sequence[EncodedPrompt], steps: Sequence[Step]
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """Of every step: t, what the frozen model said, and what the model says now."""
    condition = stack_conditions([prompt.condition for prompt in prompts], model.device)
    for step in steps:
        t, count = torch.tensor(step.t, device=model.device), len(prompts)
        now = velocities(model, step.x_t[:count], t, {PROMPT: condition})[PROMPT]
        yield t, {name: said[:count] for name, said in step.velocities.items()}, now
