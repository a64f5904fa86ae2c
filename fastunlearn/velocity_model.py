"""A diffusers transformer as the callable `(x_t, t, cond) -> velocity` that the losses call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.families import Condition, Family, family_of, find_transformer
from fastunlearn.ops.arguments import check_number


def _checked_condition(family: Family, cond: Tensor | Condition, batch: int) -> Mapping[str, Tensor]:
    """The condition as a mapping, checked to have the tensors that the family needs, with a batch of 1 or `batch`."""
    if isinstance(cond, Tensor):
        cond = {"encoder_hidden_states": cond}
    if not isinstance(cond, Mapping):
        raise TypeError(
            f"cond: expected text embeddings (B, L, D), or a mapping with {', '.join(family.conditions)}; "
            f"got {type(cond).__name__}"
        )
    missing = [name for name in family.conditions if name not in cond]
    unknown = [name for name in cond if name not in family.conditions]
    if missing or unknown:
        raise ValueError(
            f"cond: expected {', '.join(family.conditions)} for {family.transformer}; "
            f"missing: {missing}, unknown: {unknown}"
        )
    sizes: dict[str, int] = {}
    for name, dims in family.conditions.items():
        value = cond[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"cond[{name!r}]: expected a tensor, got {type(value).__name__}")
        shape = tuple(value.shape)
        if len(shape) != 1 + len(dims) or shape[0] not in (1, batch):
            raise ValueError(f"cond[{name!r}]: expected ({batch} or 1, {', '.join(dims)}), got shape {shape}")
        for dim, size in zip(dims, shape[1:], strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"cond[{name!r}]: expected {dim} = {sizes[dim]}, as in the other tensors, got shape {shape}"
                )
    return cond


class VelocityModel(nn.Module):
    """A diffusers transformer, callable as `(x_t, t, cond) -> velocity`. Made by `as_velocity_model`.

    Attributes:
        transformer: the diffusers transformer.
        channel_dim: the channel dimension of latents and velocities.
        embedded_guidance_scale: the guidance scale that a guidance-distilled transformer gets as an input.
    """

    def __init__(self, transformer: nn.Module, embedded_guidance_scale: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.channel_dim = family_of(transformer).channel_dim
        self.embedded_guidance_scale = embedded_guidance_scale

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Tensor | Condition) -> Tensor:
        """Predicts the velocity at x_t.

        Args:
            x_t: noisy latents in the transformer's own layout and dtype: (B, F, C, H, W) if `channel_dim` is 2, as in
                CogVideoX, or (B, C, F, H, W) if it is 1.
            t: timesteps, (B,), or one for all samples, as the family's scheduler counts them (0 to 1000). Keep them in
                float32 or integers: in half precision, neighbouring timesteps become equal.
            cond: a mapping with the tensors that the transformer's forward method takes, by keyword:
                `encoder_hidden_states`, text embeddings (B, L, D), and what else the family needs (HunyuanVideo:
                `encoder_attention_mask` (B, L) and `pooled_projections` (B, P)). A tensor alone is taken as the text
                embeddings. A batch of 1 is used for all samples. Floating-point tensors are cast to the dtype of `x_t`.

        Returns:
            The velocity, shaped like x_t.

        Raises:
            TypeError: `x_t`, `cond` or one of its entries is not a tensor. None is not accepted as a condition: pass
                that of the empty prompt.
            ValueError: a shape does not fit, or entries of `cond` are missing or unknown.
        """
        transformer, family = find_transformer(self.transformer)
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t: expected a tensor of noisy latents, got {type(x_t).__name__}")
        if x_t.dim() != 5:
            raise ValueError(f"x_t: expected five dimensions, got shape {tuple(x_t.shape)}")
        config: Any = transformer.config
        if x_t.shape[self.channel_dim] != config.in_channels:
            raise ValueError(
                f"x_t: expected {config.in_channels} channels in dimension {self.channel_dim}, "
                f"got shape {tuple(x_t.shape)}"
            )
        batch = x_t.shape[0]
        cond = _checked_condition(family, cond, batch)
        t = torch.as_tensor(t, device=x_t.device)
        if t.dim() > 1 or t.numel() not in (1, batch):
            raise ValueError(f"t: expected one timestep or ({batch},), got shape {tuple(t.shape)}")
        inputs = {
            name: (value.to(x_t.dtype) if value.is_floating_point() else value).expand(batch, *value.shape[1:])
            for name, value in cond.items()
        }
        inputs |= family.extra_inputs(transformer, x_t, self.embedded_guidance_scale)
        return self.transformer(hidden_states=x_t, timestep=t.expand(batch), return_dict=False, **inputs)[0]


def as_velocity_model(transformer: nn.Module, *, embedded_guidance_scale: float | None = None) -> VelocityModel:
    """Turns a diffusers transformer into the callable `(x_t, t, cond) -> velocity` that the losses take.

    The transformer is not copied: erasers attached to the transformer are on the VelocityModel too, and vice versa.

    Args:
        transformer: a transformer of a supported family. A VelocityModel is returned as it is, or as a new one if
            another `embedded_guidance_scale` is given.
        embedded_guidance_scale: the guidance scale that a guidance-distilled HunyuanVideo (configured with
            `guidance_embeds`) gets as an input; None for the default of its pipeline, 6. Other transformers ignore it.

    Returns:
        The model for the losses, captures and eraser functions.

    Raises:
        TypeError: the transformer is of no supported family, or the scale is not a number.
        ValueError: the transformer is a variant of its family that is not supported, or the scale is not finite.
    """
    if embedded_guidance_scale is not None:
        check_number("embedded_guidance_scale", embedded_guidance_scale)
        if not math.isfinite(embedded_guidance_scale):
            raise ValueError(f"embedded_guidance_scale: expected a finite number, got {embedded_guidance_scale}")
    if isinstance(transformer, VelocityModel):
        if embedded_guidance_scale in (None, transformer.embedded_guidance_scale):
            return transformer
        transformer = transformer.transformer
    if embedded_guidance_scale is None:
        embedded_guidance_scale = family_of(transformer).embedded_guidance_scale or 1.0
    return VelocityModel(transformer, embedded_guidance_scale)
