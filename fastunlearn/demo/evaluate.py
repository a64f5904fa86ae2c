"""What the demo measures on generated videos: which objects appear, in which colours and places, and how masks fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.demo.judge import Judge, colour_maps
from fastunlearn.demo.model import PATCH
from fastunlearn.demo.prompts import kinds_in
from fastunlearn.demo.world import COLOURS, HAZE, KINDS, SHAPES, WIDTH, Nouns, presence

Share = dict[str, Any]  # "share", of how many "videos", and its 95% "interval"


def share(rows: Sequence[bool]) -> Share | None:
    """Returns the share of the rows that are true, with Wilson's 95% interval; None if there are no rows."""
    if not rows:
        return None
    n, p, z = len(rows), sum(rows) / len(rows), 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    interval = [round(max(0.0, centre - spread), 4), round(min(1.0, centre + spread), 4)]
    return {"share": round(p, 4), "videos": n, "interval": interval}


@torch.no_grad()
def seen_by(judge: Judge, videos: Tensor) -> Tensor:
    """Returns whether the judge sees each kind of object in each colour: (B, kinds, colours) bool, on the CPU."""
    return (judge(videos) > 0).cpu()


def appearances(seen: Tensor, prompts: Sequence[Nouns], concept: str) -> dict[str, dict[str, Share | None]]:
    """Measures how often each kind of object appears in videos; None where there are no such videos.

    Args:
        seen: (B, kinds, colours), what `seen_by` returns for the videos.
        prompts: the prompt of each video. None of them asks for a haze.
        concept: the erased shape.

    Returns:
        For each shape: "asked", over the videos whose prompt names it, except those of "beside"; "beside", over the
        videos whose prompt names it and the concept; "uninvited", over the videos whose prompt does not name it; and
        "colour", over the videos whose prompt names it, how often the colour that it asks for appears in any kind of
        object. For the haze: "replacing", over the videos whose prompt names the concept, and "uninvited", over the
        others.
    """
    report: dict[str, dict[str, Share | None]] = {}
    for index, shape in enumerate(SHAPES):
        rows: dict[str, list[bool]] = {"asked": [], "beside": [], "uninvited": [], "colour": []}
        for video, nouns in zip(seen, prompts, strict=True):
            colour_of = {noun.kind: noun.colour for noun in nouns}
            appears = bool(video[index].any())
            if shape not in colour_of:
                rows["uninvited"].append(appears)
                continue
            rows["beside" if concept in colour_of and shape != concept else "asked"].append(appears)
            rows["colour"].append(bool(video[:, list(COLOURS).index(colour_of[shape])].any()))
        report[shape] = {name: share(values) for name, values in rows.items()}
    hazes = seen[:, KINDS.index(HAZE)].any(dim=1).tolist()
    names_concept = [concept in kinds_in(nouns) for nouns in prompts]
    report[HAZE] = {
        name: share([haze for haze, is_named in zip(hazes, names_concept, strict=True) if is_named == expected])
        for name, expected in (("replacing", True), ("uninvited", False))
    }
    return report


def together(seen: Tensor, prompts: Sequence[Nouns], concept: str) -> Share | None:
    """Returns the share of the videos that show both shapes, over those whose prompt names both without the concept."""
    others = [KINDS.index(shape) for shape in SHAPES if shape != concept]
    named = {KINDS[index] for index in others}
    both = seen[:, others].any(dim=2).all(dim=1).tolist()
    return share([shows for shows, nouns in zip(both, prompts, strict=True) if kinds_in(nouns) == named])


def binding(seen: Tensor, videos: Tensor, prompts: Sequence[Nouns]) -> dict[str, Share | None]:
    """Measures how well videos of two objects follow their prompts.

    The judge does not say where an object is, but the objects of a prompt differ in colour. So the first object is on
    the left if the centre of its colour is left of the centre of the other colour.

    Args:
        seen: (B, kinds, colours), what `seen_by` returns for the videos.
        videos: (B, F, 3, H, W) in [-1, 1].
        prompts: the prompt of each video. Those for one object do not count.

    Returns:
        The shares of "kinds", the videos that show the named kinds and no others, in whatever colours; and of "all",
        those that also have the kinds in the right colours and in the right order.
    """
    asked = presence(prompts)
    same_kinds = (seen.any(dim=2) == asked.any(dim=2)).all(dim=1)
    same_objects = (seen == asked).flatten(1).all(dim=1)
    mass = colour_maps(videos).sum(dim=(1, 3)).cpu()  # (B, colours, W)
    centres = (mass * torch.arange(WIDTH)).sum(dim=2) / mass.sum(dim=2)
    rows: dict[str, list[bool]] = {"kinds": [], "all": []}
    for index, nouns in enumerate(prompts):
        if len(nouns) == 2:
            left, right = (centres[index, list(COLOURS).index(noun.colour)] for noun in nouns)
            rows["kinds"].append(bool(same_kinds[index]))
            rows["all"].append(bool(same_objects[index] and left < right))
    return {name: share(values) for name, values in rows.items()}


@torch.no_grad()
def mask_overlap(judge: Judge, masks: Tensor, videos: Tensor, concept: str) -> float:
    """Returns the mean IoU of the masks (B, F, h, w) with the concept, on the token grid.

    The concept is taken to be wherever the video has the colour in which the judge sees the concept. That is the colour
    in the prompt or, if the model has swapped the colours of two objects, the colour of the other object.
    """
    colours = judge(videos)[:, KINDS.index(concept)].argmax(dim=1)
    maps = colour_maps(videos)[torch.arange(len(videos)), :, colours]
    objects = F.avg_pool2d(maps, PATCH) >= 0.5
    inside = masks.to(objects.device).bool()
    intersection, union = (inside & objects).flatten(1).sum(1), (inside | objects).flatten(1).sum(1)
    return (intersection / union.clamp(min=1)).mean().item()
