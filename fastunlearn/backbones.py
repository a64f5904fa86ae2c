"""What differs between video transformers, as data.

Everything else in the library asks here: which attentions exist, where the text tokens stand, which dimension holds the
channels, and what the transformer's forward method wants to be given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Inputs = Callable[[nn.Module, Tensor, Tensor, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Backbone:
    """One family of video transformers.

    Attributes:
        name: what saved erasers call the family.
        transformer: the class name of its diffusers transformer.
        erased: (list of blocks, attribute) of the attentions that erasers sit on. Such an attention returns the video
            tokens (B, N, D), alone or first in a tuple with the text tokens.
        text_attended: the same for the attentions in which video tokens attend to text tokens.
        text_position: where the text stands among the keys of `text_attended`: before the video tokens, after them, or
            alone ("cross"). Queries are laid out alike; with "cross" they are video tokens only.
        channel_dim: which dimension of a latent or a velocity holds the channels.
        inputs: `(transformer, x_t, t, cond)` to the keyword arguments of the transformer's forward method.
    """

    name: str
    transformer: str
    erased: tuple[tuple[str, str], ...]
    text_attended: tuple[tuple[str, str], ...]
    text_position: Literal["first", "last", "cross"]
    channel_dim: int
    inputs: Inputs

    def video_and_text(self, length: int, text_length: int) -> tuple[slice, slice]:
        """Where the video tokens stand among the queries, and the text tokens among the keys, of `text_attended`."""
        if self.text_position == "first":
            return slice(text_length, None), slice(0, text_length)
        if self.text_position == "last":
            return slice(0, length - text_length), slice(length - text_length, None)
        return slice(None), slice(None)


def _cogvideox_rotary(
    head_dim: int,
    patch: int,
    patch_t: int | None,
    trained_size: tuple[int, int],
    size: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the video tokens, as `CogVideoXPipeline._prepare_rotary_positional_embeddings` has them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, *pixels = size
    grid = (pixels[0] // patch, pixels[1] // patch)
    base_height, base_width = trained_size[0] // patch, trained_size[1] // patch
    if patch_t is None:
        return get_3d_rotary_pos_embed(
            embed_dim=head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid, base_width, base_height),
            grid_size=grid,
            temporal_size=frames,
            device=device,
        )
    return get_3d_rotary_pos_embed(
        embed_dim=head_dim,
        crops_coords=None,
        grid_size=grid,
        temporal_size=(frames + patch_t - 1) // patch_t,
        grid_type="slice",
        max_size=(base_height, base_width),
        device=device,
    )


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached inference tensor would break the training that comes after sampling
def _cached_cogvideox_rotary(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _cogvideox_rotary(*arguments)


def _cogvideox_inputs(transformer: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor) -> dict[str, Any]:
    config: Any = transformer.config
    inputs: dict[str, Any] = {"hidden_states": x_t, "encoder_hidden_states": cond, "timestep": t}
    if config.use_rotary_positional_embeddings:
        frames, _, height, width = x_t.shape[1:]
        rotary = _cogvideox_rotary if torch.compiler.is_compiling() else _cached_cogvideox_rotary  # traced: constant
        inputs["image_rotary_emb"] = rotary(
            config.attention_head_dim,
            config.patch_size,
            config.patch_size_t,
            (config.sample_height, config.sample_width),
            (frames, height, width),
            x_t.device,
        )
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = x_t.new_full((1,), 2.0)  # the pipeline's constant
    return inputs


BACKBONES = (
    Backbone(
        name="cogvideox",
        transformer="CogVideoXTransformer3DModel",
        erased=(("transformer_blocks", "attn1"),),
        text_attended=(("transformer_blocks", "attn1"),),
        text_position="first",
        channel_dim=2,
        inputs=_cogvideox_inputs,
    ),
)


def _backbone_of_class(cls: type) -> Backbone | None:
    """By name and through the bases: FSDP and users subclass, and diffusers must not be imported for this."""
    names = {base.__name__ for base in cls.__mro__}
    return next((backbone for backbone in BACKBONES if backbone.transformer in names), None)


def find_transformer(model: nn.Module) -> tuple[nn.Module, Backbone]:
    """The diffusers transformer inside a VelocityModel, a compiled or a (distributed) data-parallel model; its family.

    Raises:
        TypeError: there is no supported transformer inside.
    """
    inner: Any = model
    while isinstance(inner, nn.Module):
        backbone = _backbone_of_class(type(inner))
        if backbone is not None:
            return inner, backbone
        if isinstance(inner, VelocityModel):
            inner = inner.transformer
        else:
            inner = inner._modules.get("_orig_mod", inner._modules.get("module"))
    supported = ", ".join(backbone.transformer for backbone in BACKBONES)
    raise TypeError(f"model: expected one of {supported}, possibly wrapped, got {type(model).__name__}")


def backbone_of(model: nn.Module) -> Backbone:
    """The family `model` belongs to, found by the class name of its transformer.

    Raises:
        TypeError: the model is of no supported family.
    """
    return find_transformer(model)[1]


def attentions(transformer: nn.Module, places: tuple[tuple[str, str], ...]) -> dict[str, nn.Module]:
    """The attentions at `places`, (list of blocks, attribute) each, by their path from the transformer."""
    return {
        f"{blocks}.{index}.{attribute}": getattr(block, attribute)
        for blocks, attribute in places
        for index, block in enumerate(getattr(transformer, blocks))
    }


class VelocityModel(nn.Module):
    """A diffusers transformer, callable as `(x_t, t, cond) -> velocity`. Made by `as_velocity_model`."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.channel_dim = backbone_of(transformer).channel_dim

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Tensor) -> Tensor:
        """The model's prediction at x_t.

        Args:
            x_t: noisy latents in the transformer's own layout and dtype, (B, F, C, H, W) for CogVideoX.
            t: timesteps, (B,), or one for all samples.
            cond: text embeddings (B, L, D), or (1, L, D) for all samples. Computed with in x_t's dtype.

        Returns:
            The velocity, shaped like x_t.

        Raises:
            TypeError: `x_t` or `cond` is not a tensor. There is no unconditional call: pass the empty prompt's
                embeddings.
            ValueError: a shape does not fit.
        """
        if not isinstance(cond, Tensor):
            raise TypeError(f"cond: expected text embeddings (B, L, D), got {type(cond).__name__}")
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t: expected noisy latents, got {type(x_t).__name__}")
        batch = x_t.shape[0]
        if x_t.dim() != 5:
            raise ValueError(f"x_t: expected five dimensions, got shape {tuple(x_t.shape)}")
        if cond.dim() != 3 or cond.shape[0] not in (1, batch):
            raise ValueError(f"cond: expected ({batch} or 1, L, D), got shape {tuple(cond.shape)}")
        t = torch.as_tensor(t, device=x_t.device)
        if t.dim() > 1 or t.numel() not in (1, batch):
            raise ValueError(f"t: expected one timestep or ({batch},), got shape {tuple(t.shape)}")
        cond = cond.to(x_t.dtype).expand(batch, -1, -1)
        transformer, backbone = find_transformer(self.transformer)
        inputs = backbone.inputs(transformer, x_t, t.expand(batch), cond)
        return self.transformer(**inputs, return_dict=False)[0]


def as_velocity_model(transformer: nn.Module) -> VelocityModel:
    """Turns a diffusers transformer into the callable `(x_t, t, cond) -> velocity` that the losses want.

    The transformer is held, not copied: erasers attached to either are seen by both.

    Raises:
        TypeError: the transformer is of no supported family.
    """
    return transformer if isinstance(transformer, VelocityModel) else VelocityModel(transformer)
