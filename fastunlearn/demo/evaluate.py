"""What the demo reports: who appears, in which colour, how well masks fit, and how the velocity has turned."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.demo.erase import two
from fastunlearn.demo.judge import Judge, colour_maps
from fastunlearn.demo.model import PATCH, TextToVideo
from fastunlearn.demo.sampling import Step
from fastunlearn.demo.world import COLOURS, SHAPES, Noun

ALONE, PAIRED = 12, 16  # videos a shape, videos a pair of shapes


Request = tuple[Noun, ...]


def requests(concept: str, draw: random.Random) -> tuple[list[Request], list[Request]]:
    """What is asked for before and after: every shape alone, and every pair. Those with the concept, and the others.

    In either list the requests for one shape come first.
    """
    colours = list(COLOURS)
    drawn: list[Request] = [(Noun(shape, colours[index % len(colours)]),) for shape in SHAPES for index in range(ALONE)]
    drawn += [two(*pair, draw) for pair in itertools.combinations(SHAPES, 2) for _ in range(PAIRED)]
    asking = [request for request in drawn if concept in (noun.shape for noun in request)]
    return asking, [request for request in drawn if request not in asking]


def _share(rows: Sequence[bool]) -> float | None:
    return sum(rows) / len(rows) if rows else None


@torch.no_grad()
def appearances(
    judge: Judge, videos: Tensor, asked: Sequence[Request], concept: str
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
    inside = masks.bool()
    common, either = (inside & objects).flatten(1).sum(1), (inside | objects).flatten(1).sum(1)
    return (common / either.clamp(min=1)).mean().item()


@torch.no_grad()
def erasure_coefficient(model: TextToVideo, prompts: Sequence[str], steps: Sequence[Step]) -> float:
    """The coefficient of v_theta' - v_uncond on v_c - v_uncond, over all points of the frozen model's trajectories.

    1 where nothing is erased, 0 where the prompt says nothing any more, below 0 where it repels. `steps` may have more
    rows than there are prompts: the first ones count.
    """
    text, count = model.encode(list(prompts)), len(prompts)
    along = length = 0.0
    for step in steps:
        v_uncond = step.v_uncond[:count]
        direction = step.v_cond[:count] - v_uncond
        along += ((model.velocity(step.x_t[:count], step.t[:count], text) - v_uncond) * direction).sum().item()
        length += direction.square().sum().item()
    return along / length


@torch.no_grad()
def drift(model: TextToVideo, prompts: Sequence[str], steps: Sequence[Step]) -> float:
    """||v_theta' - v_theta|| / ||v_theta|| over all points of the frozen model's trajectories."""
    text = model.encode(list(prompts))
    difference = length = 0.0
    for step in steps:
        difference += (model.velocity(step.x_t, step.t, text) - step.v_cond).square().sum().item()
        length += step.v_cond.square().sum().item()
    return (difference / length) ** 0.5
