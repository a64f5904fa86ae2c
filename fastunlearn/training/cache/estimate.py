"""What `prepare` will cost, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fastunlearn.dtypes import model_dtype
from fastunlearn.families import hidden_size
from fastunlearn.training.cache.plan import Plan, guidance_scale_of, video_size
from fastunlearn.training.data.prompts import occurrences
from fastunlearn.training.data.requests import prompts_of, requests_of
from fastunlearn.training.model.loading import Outline, outline_pipeline
from fastunlearn.training.options import PrepareOptions

# The most numbers that a forward pass without gradients holds at a time, for each of the D features of every token:
# measured as 12 for CogVideoX, 17 for HunyuanVideo and 10 for Wan.
_WIDTHS_AT_WORK = 17
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Estimate:
    """The cost of a teacher cache.

    Attributes:
        trajectories: to sample, or videos.
        points: in the cache.
        forwards: forward passes of a transformer, counted a sample.
        disk: bytes of the cache.
        encoders: bytes of the text encoders, which are gone before the transformers come.
        transformers: bytes of their weights.
        at_work: bytes of a batch on its way through a block, roughly.
    """

    trajectories: int
    points: int
    forwards: int
    disk: int
    encoders: int
    transformers: int
    at_work: int

    @property
    def memory(self) -> int:
        """Bytes at the peak, roughly."""
        return max(self.encoders, self.transformers + self.at_work)

    def __str__(self) -> str:
        lines = (
            ("trajectories", f"{self.trajectories:,}"),
            ("points", f"{self.points:,}"),
            ("forward passes", f"{self.forwards:,} of one sample each"),
            ("on disk", _readable(self.disk)),
            ("memory", f"about {_readable(self.memory)}"),
            ("  text encoders", f"{_readable(self.encoders)}, freed before the transformers are loaded"),
            ("  transformers", _readable(self.transformers)),
            ("  a batch at work", f"about {_readable(self.at_work)}"),
        )
        return "\n".join(f"{name:<18} {value}" for name, value in lines)


def estimate(options: PrepareOptions) -> Estimate:
    """What the cache that `options` describe will cost. No weights are read.

    Raises: as `requests_of` and `outline_pipeline` do.
    """
    requests = requests_of(options)
    outline = outline_pipeline(options.pretrained_model_name_or_path)
    model, item = outline.model, model_dtype(options.mixed_precision).itemsize
    masked = {request.group for request in requests if occurrences(request.prompt, options.concept)}
    plan = Plan(requests, options, guidance_scale_of(options, model.defaults), masked)
    latent_shape = model.latent_shape(**video_size(options, model.defaults))
    tokens = prod(model.token_grid(latent_shape))
    point = 3 * prod(latent_shape) * item + torch.float32.itemsize + torch.int32.itemsize
    masks = sum(tokens * len(plan.chosen[n]) for n, request in enumerate(requests) if request.group in masked)
    conditions = len(prompts_of(requests, options.negative_prompt)) * _size_of_a_condition(outline, item)
    rows = options.batch_size * max(len(plan.everywhere(unit.kind)) for unit in plan.units)
    width = hidden_size(model.experts[0].transformer)
    return Estimate(
        trajectories=len(requests),
        points=plan.points,
        forwards=plan.forwards,
        disk=plan.points * point + masks + conditions,
        encoders=outline.text_encoder_parameters * item,
        transformers=sum(p.numel() for expert in model.experts for p in expert.parameters()) * item,
        at_work=rows * (tokens + outline.text_length) * width * _WIDTHS_AT_WORK * item,
    )


def _size_of_a_condition(outline: Outline, item: int) -> int:
    config: Any = outline.model.experts[0].transformer.config
    family = outline.model.family
    sizes = {"L": outline.text_length, **family.condition_sizes(config)}
    return sum(
        prod(sizes[dim] for dim in dims) * (torch.int64.itemsize if dims == ("L",) else item)  # a mask of the text
        for dims in family.conditions.values()
    )


def _readable(count: float) -> str:
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if count >= 99.5 or unit == 0 else f"{count:.1f} {_UNITS[unit]}"
