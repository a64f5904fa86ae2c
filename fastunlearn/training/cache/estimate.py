"""What `prepare` will cost, computed from the model's configuration files without reading any weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fastunlearn.dtypes import model_dtype
from fastunlearn.families import hidden_size
from fastunlearn.training.cache.plan import Plan
from fastunlearn.training.data.requests import distinct_prompts, read_requests
from fastunlearn.training.data.words import occurrences
from fastunlearn.training.model.loading import Outline, outline_pipeline
from fastunlearn.training.options import PrepareOptions

# The peak number of activations in a forward pass without gradients, per token and feature: measured as 12 for
# CogVideoX, 17 for HunyuanVideo and 10 for Wan.
ACTIVATIONS_PER_FEATURE = 17
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Estimate:
    """The cost of a teacher cache.

    Attributes:
        trajectories: the number of trajectories or given videos.
        points: the number of points in the cache.
        forward_passes: the number of forward passes of a transformer, per sample.
        disk: bytes of the cache.
        text_encoders: bytes of the text encoders, which are freed before the transformers are loaded.
        transformers: bytes of the transformers' weights.
        activations: approximate bytes of the activations of one batch.
    """

    trajectories: int
    points: int
    forward_passes: int
    disk: int
    text_encoders: int
    transformers: int
    activations: int

    @property
    def memory(self) -> int:
        """The approximate peak memory in bytes."""
        return max(self.text_encoders, self.transformers + self.activations)

    def __str__(self) -> str:
        lines = (
            ("trajectories", f"{self.trajectories:,}"),
            ("points", f"{self.points:,}"),
            ("forward passes", f"{self.forward_passes:,} of one sample each"),
            ("on disk", _readable(self.disk)),
            ("memory", f"about {_readable(self.memory)}"),
            ("  text encoders", f"{_readable(self.text_encoders)}, freed before the transformers are loaded"),
            ("  transformers", _readable(self.transformers)),
            ("  activations", f"about {_readable(self.activations)}"),
        )
        return "\n".join(f"{name:<18} {value}" for name, value in lines)


def estimate(options: PrepareOptions) -> Estimate:
    """Estimates the cost of the cache that `options` describe.

    Raises: what `read_requests` and `outline_pipeline` raise.
    """
    requests = read_requests(options)
    outline = outline_pipeline(options.pretrained_model_name_or_path, trust_remote_code=options.trust_remote_code)
    model, itemsize = outline.model, model_dtype(options.mixed_precision).itemsize
    masked_groups = {request.group for request in requests if occurrences(request.prompt, options.concept)}
    plan = Plan(requests, options, model.defaults.guidance(options.guidance_scale), masked_groups)
    size = model.defaults.size(options.height, options.width, options.num_frames)
    latent_shape = model.latent_shape(*size)
    tokens = prod(model.token_grid(latent_shape))
    point_bytes = 3 * prod(latent_shape) * itemsize + torch.float32.itemsize + torch.int32.itemsize
    mask_bytes = sum(
        tokens * len(steps)
        for steps, request in zip(plan.point_steps, requests, strict=True)
        if request.group in masked_groups
    )
    condition_bytes = len(distinct_prompts(requests, options.negative_prompt)) * _condition_bytes(outline, itemsize)
    rows = options.batch_size * max(len(plan.conditions_at_every_step(unit.template)) for unit in plan.units)
    width = hidden_size(model.experts[0].transformer)
    return Estimate(
        trajectories=len(requests),
        points=plan.num_points,
        forward_passes=plan.num_forwards,
        disk=plan.num_points * point_bytes + mask_bytes + condition_bytes,
        text_encoders=outline.text_encoder_parameters * itemsize,
        transformers=sum(p.numel() for expert in model.experts for p in expert.parameters()) * itemsize,
        activations=rows * (tokens + outline.text_length) * width * ACTIVATIONS_PER_FEATURE * itemsize,
    )


def _condition_bytes(outline: Outline, itemsize: int) -> int:
    config: Any = outline.model.experts[0].transformer.config
    family = outline.model.family
    sizes = {"L": outline.text_length, **family.condition_sizes(config)}
    return sum(
        prod(sizes[dim] for dim in dims) * (torch.int64.itemsize if dims == ("L",) else itemsize)  # ("L",): a text mask
        for dims in family.conditions.values()
    )


def _readable(count: float) -> str:
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if count >= 99.5 or unit == 0 else f"{count:.1f} {_UNITS[unit]}"
