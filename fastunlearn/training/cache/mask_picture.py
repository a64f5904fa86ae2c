"""Shows the masks of a cache, so that one sees whether they are where the concept is: most failures start there."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastunlearn.files import open_safetensors, shown
from fastunlearn.masks import overlay
from fastunlearn.ops.spatial_masks import match_resolution
from fastunlearn.training.cache import shards
from fastunlearn.training.cache.index import MASKS
from fastunlearn.training.cache.teacher import Teacher
from fastunlearn.training.cache.writer import CacheWriter
from fastunlearn.training.data.comparison import shown_size, write_strip
from fastunlearn.training.data.requests import PROMPT, Request

NEARLY_EMPTY, NEARLY_FULL = 0.01, 0.9  # shares of the tokens: below and above these, a mask tells little
_MOST_ROWS = 8
_FRAMES = 6
_OUTLINE = (1.0, 0.2, 0.6)


class _Masked(NamedTuple):
    """A trajectory with a mask: its request, its unit, the row of its last point there, and its share of tokens."""

    request: Request
    unit: int
    row: int
    share: float


def show_masks(teacher: Teacher, writer: CacheWriter) -> None:
    """Writes `masks.png` into a finished cache, and warns of masks that are nearly empty or nearly full.

    A row is a trajectory with a mask, and there are a few, evenly chosen. Its frames are of the model's estimate of the
    video at the last of its points: decoded if the model has its VAE, else latents in false colours. They are grey
    outside the mask.

    Args:
        teacher: what computed the cache.
        writer: the finished cache.

    Raises:
        OSError: the file cannot be written.
    """
    masked = _masked_trajectories(teacher, writer)
    if not masked:
        return
    _warn(masked, writer)
    count = min(_MOST_ROWS, len(masked))
    chosen = [masked[(2 * number + 1) * len(masked) // (2 * count)] for number in range(count)]
    write_strip(
        writer.folder / MASKS,
        [_frames(teacher, writer, trajectory) for trajectory in chosen],
        [f"{trajectory.share:.0%} of the tokens" for trajectory in chosen],
        f"Where {shown(teacher.options.concept)} is: in colour inside the mask, grey outside",
        frames=_FRAMES,
        captions=[_caption(trajectory.request) for trajectory in chosen],
        alarming=[number for number, trajectory in enumerate(chosen) if _is_alarming(trajectory)],
    )


def _masked_trajectories(teacher: Teacher, writer: CacheWriter) -> list[_Masked]:
    plan = teacher.plan
    masked = []
    for number, unit in enumerate(plan.units):
        if unit.template.group not in plan.masked_groups:
            continue
        with open_safetensors(writer.folder / shards.file_name(number)) as file:
            end = 0
            for index in unit.trajectories:
                end += len(plan.point_steps[index])
                share = file.get_slice("mask")[end - 1].float().mean().item()
                masked.append(_Masked(plan.requests[index], number, end - 1, share))
    return masked


def _is_alarming(trajectory: _Masked) -> bool:
    return not NEARLY_EMPTY <= trajectory.share <= NEARLY_FULL


def _warn(masked: list[_Masked], writer: CacheWriter) -> None:
    empty = sum(trajectory.share < NEARLY_EMPTY for trajectory in masked)
    full = sum(trajectory.share > NEARLY_FULL for trajectory in masked)
    for count, kind, bound, change in (
        (empty, "empty", f"less than {NEARLY_EMPTY:.0%}", "lower"),
        (full, "full", f"more than {NEARLY_FULL:.0%}", "raise"),
    ):
        if count:
            warnings.warn(
                f"masks: expected the concept in a part of the video, got {count} of {len(masked)} masks nearly {kind} "
                f"({bound} of the tokens); look at {writer.folder / MASKS}, then {change} --mask-threshold, or choose "
                "other --mask-layers, for another cache",
                stacklevel=4,
            )


def _caption(request: Request) -> str:
    if request.follow == PROMPT:
        return request.prompt
    instead = "the negative prompt" if request.instead is None else request.instead
    return f"{request.prompt}  (this video follows: {instead})"


def _frames(teacher: Teacher, writer: CacheWriter, trajectory: _Masked) -> Tensor:
    """The frames (F, 3, H, W) of a row, at the size at which they are shown."""
    model, size = teacher.model, teacher.size
    with open_safetensors(writer.folder / shards.file_name(trajectory.unit)) as file:
        x_t, v_cond, mask = (file.get_slice(name)[trajectory.row][None] for name in ("x_t", "v_cond", "mask"))
        t = file.get_slice("t")[trajectory.row][None]
    x_0 = model.estimate_x_0(x_t.float(), v_cond.float(), t)
    if model.vae is not None:
        video = model.decode(x_0.to(model.device), size.num_frames)[0]
    else:
        video = _false_colours(x_0[0].movedim(model.family.channel_dim - 1, 0))
    width, height = shown_size(size.width, size.height)
    video = torch.nn.functional.interpolate(video, (height, width), mode="nearest")
    inside = (
        match_resolution(mask.float(), (1, *video.shape), channel_dim=2).reshape(len(video), 1, height, width) > 0.5
    )
    outside_near = torch.nn.functional.max_pool2d((~inside).float(), 5, stride=1, padding=2) > 0.5
    outline = torch.tensor(_OUTLINE)[:, None, None]
    return torch.where(inside & outside_near, outline, overlay(video, mask[0].float()))


def _false_colours(latents: Tensor) -> Tensor:
    """Latents (C, F, h, w) as frames (F, 3, h, w) in [0, 1]: their three principal components, between percentiles."""
    channels, *grid = latents.shape
    values = latents.reshape(channels, -1)
    values = values - values.mean(1, keepdim=True)
    _, directions = torch.linalg.eigh(values @ values.T)  # in ascending order
    directions = directions.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    colours = (directions * largest.sign()).T @ values  # the sign of a direction would be left to chance
    colours = torch.nn.functional.pad(colours, (0, 0, 0, 3 - len(colours)))
    low, high = colours.quantile(0.02, 1, keepdim=True), colours.quantile(0.98, 1, keepdim=True)
    scaled = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return scaled.reshape(3, *grid).movedim(0, 1)
