"""What differs between video transformers, as data.

Everything else in the library asks here: which attentions exist, where the text tokens stand, which dimension holds the
channels, how the family is sampled, and what the transformer's forward method wants to be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastunlearn.arguments import check_number

Condition = Tensor | Mapping[str, Tensor]
MoreInputs = Callable[[nn.Module, Tensor, float], dict[str, Any]]
Places = tuple[tuple[str, str], ...]


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
        channel_dim: which dimension of a latent or a velocity holds the channels: 2 in (B, F, C, H, W), 1 in
            (B, C, F, H, W).
        flow_matching: whether the model predicts noise - x0 at x_t = (1 - s) x0 + s noise, t = 1000 s. Otherwise v or
            noise in a schedule of `alphas_cumprod`, as its scheduler says.
        guidance_scale: of classifier-free guidance, its pipeline's default for sampling. 1: one call a step.
        conditions: the tensors that a condition consists of, by keyword of the transformer's forward method, with the
            names of their dimensions after the batch. Dimensions of one name are of one size.
        more_inputs: `(transformer, x_t, embedded_guidance_scale)` to the keyword arguments of the forward method that
            are neither latents, timestep nor condition.
        embedded_guidance_scale: the pipeline's default of the scale that a guidance-distilled transformer takes as an
            input; None where the family has no such transformers.
        supported: entries of the transformer's configuration that must have these values. Others, made for images as
            further conditions, are refused.
    """

    name: str
    transformer: str
    erased: Places
    text_attended: Places
    text_position: Literal["first", "last", "cross"]
    channel_dim: int
    flow_matching: bool
    guidance_scale: float
    conditions: Mapping[str, tuple[str, ...]]
    more_inputs: MoreInputs
    embedded_guidance_scale: float | None = None
    supported: Mapping[str, Any] = field(default_factory=dict)

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


def _cogvideox_inputs(transformer: nn.Module, x_t: Tensor, embedded_guidance_scale: float) -> dict[str, Any]:
    config: Any = transformer.config
    inputs: dict[str, Any] = {}
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


def _hunyuan_video_inputs(transformer: nn.Module, x_t: Tensor, embedded_guidance_scale: float) -> dict[str, Any]:
    config: Any = transformer.config
    if not config.guidance_embeds:
        return {}
    # Multiplied after it is rounded to the model's dtype, as in the pipeline.
    return {"guidance": x_t.new_full(x_t.shape[:1], embedded_guidance_scale) * 1000.0}


_TEXT = {"encoder_hidden_states": ("L", "D")}
_HUNYUAN_VIDEO_ATTENTIONS = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))

BACKBONES = (
    Backbone(
        name="cogvideox",
        transformer="CogVideoXTransformer3DModel",
        erased=(("transformer_blocks", "attn1"),),
        text_attended=(("transformer_blocks", "attn1"),),
        text_position="first",
        channel_dim=2,
        flow_matching=False,
        guidance_scale=6.0,
        conditions=_TEXT,
        more_inputs=_cogvideox_inputs,
    ),
    Backbone(
        name="hunyuan_video",
        transformer="HunyuanVideoTransformer3DModel",
        erased=_HUNYUAN_VIDEO_ATTENTIONS,
        text_attended=_HUNYUAN_VIDEO_ATTENTIONS,
        text_position="last",
        channel_dim=1,
        flow_matching=True,
        guidance_scale=1.0,  # distilled: guidance is an input
        conditions=_TEXT | {"encoder_attention_mask": ("L",), "pooled_projections": ("P",)},
        more_inputs=_hunyuan_video_inputs,
        embedded_guidance_scale=6.0,
        supported={"image_condition_type": None},
    ),
    Backbone(
        name="wan",
        transformer="WanTransformer3DModel",
        erased=(("blocks", "attn2"),),  # where the text enters; the self-attention, attn1, sees no word
        text_attended=(("blocks", "attn2"),),
        text_position="cross",
        channel_dim=1,
        flow_matching=True,
        guidance_scale=5.0,
        conditions=_TEXT,
        more_inputs=lambda *_: {},
        supported={"image_dim": None, "added_kv_proj_dim": None},
    ),
)


def _backbone_of_class(cls: type) -> Backbone | None:
    """By name and through the bases: FSDP and users subclass, and diffusers must not be imported for this."""
    names = {base.__name__ for base in cls.__mro__}
    return next((backbone for backbone in BACKBONES if backbone.transformer in names), None)


def _check_variant(transformer: nn.Module, backbone: Backbone) -> None:
    for entry, expected in backbone.supported.items():
        config: Any = transformer.config
        got = getattr(config, entry, expected)
        if got != expected:
            raise ValueError(
                f"model: expected a text-to-video {backbone.transformer}, configured with {entry}={expected}; "
                f"got {entry}={got!r}"
            )


def find_transformer(model: nn.Module) -> tuple[nn.Module, Backbone]:
    """The diffusers transformer inside a VelocityModel, a compiled or a (distributed) data-parallel model; its family.

    Raises:
        TypeError: there is no transformer of a supported family inside.
        ValueError: it is a variant of its family that is not supported.
    """
    inner: Any = model
    while isinstance(inner, nn.Module):
        backbone = _backbone_of_class(type(inner))
        if backbone is not None:
            _check_variant(inner, backbone)
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
        ValueError: it is a variant of its family that is not supported.
    """
    return find_transformer(model)[1]


def patch_size(model: nn.Module) -> tuple[int, int, int]:
    """(frames, rows, columns) of a latent that one video token covers.

    Raises:
        TypeError: the model is of no supported family.
        ValueError: it is a variant of its family that is not supported.
    """
    config: Any = find_transformer(model)[0].config
    if isinstance(config.patch_size, int):
        return config.patch_size_t or 1, config.patch_size, config.patch_size
    frames, rows, columns = config.patch_size
    return frames, rows, columns


def attentions(transformer: nn.Module, places: Places) -> dict[str, nn.Module]:
    """The attentions at `places`, (list of blocks, attribute) each, by their path from the transformer."""
    return {
        f"{blocks}.{index}.{attribute}": getattr(block, attribute)
        for blocks, attribute in places
        for index, block in enumerate(getattr(transformer, blocks))
    }


def _checked_condition(backbone: Backbone, cond: Condition, batch: int) -> Mapping[str, Tensor]:
    """The condition as a mapping that has what the family needs, batch 1 or `batch`."""
    if isinstance(cond, Tensor):
        cond = {"encoder_hidden_states": cond}
    if not isinstance(cond, Mapping):
        raise TypeError(
            f"cond: expected text embeddings (B, L, D), or a mapping with {', '.join(backbone.conditions)}; "
            f"got {type(cond).__name__}"
        )
    missing = [name for name in backbone.conditions if name not in cond]
    unknown = [name for name in cond if name not in backbone.conditions]
    if missing or unknown:
        raise ValueError(
            f"cond: expected {', '.join(backbone.conditions)} for {backbone.transformer}; "
            f"missing: {missing}, unknown: {unknown}"
        )
    sizes: dict[str, int] = {}
    for name, dims in backbone.conditions.items():
        value = cond[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"cond[{name!r}]: expected a tensor, got {type(value).__name__}")
        shape = tuple(value.shape)
        if len(shape) != 1 + len(dims) or shape[0] not in (1, batch):
            raise ValueError(f"cond[{name!r}]: expected ({batch} or 1, {', '.join(dims)}), got shape {shape}")
        for dim, size in zip(dims, shape[1:], strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"cond[{name!r}]: expected {dim} = {sizes[dim]} as in the others, got shape {shape}")
    return cond


class VelocityModel(nn.Module):
    """A diffusers transformer, callable as `(x_t, t, cond) -> velocity`. Made by `as_velocity_model`."""

    def __init__(self, transformer: nn.Module, embedded_guidance_scale: float) -> None:
        super().__init__()
        self.transformer = transformer
        self.channel_dim = backbone_of(transformer).channel_dim
        self.embedded_guidance_scale = embedded_guidance_scale

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The model's prediction at x_t.

        Args:
            x_t: noisy latents in the transformer's own layout and dtype: (B, F, C, H, W) for CogVideoX,
                (B, C, F, H, W) for HunyuanVideo and Wan.
            t: timesteps, (B,), or one for all samples, as the family's scheduler counts them (0 to 1000). Keep them in
                float32 or integers: half precision merges neighbours.
            cond: `encoder_hidden_states`, text embeddings (B, L, D), and for HunyuanVideo `encoder_attention_mask`
                (B, L) and `pooled_projections` (B, P), in a mapping by these names, which are the keywords of the
                transformer's forward method. A bare tensor stands for the embeddings alone. A batch of 1 serves all
                samples. Floating tensors are computed with in x_t's dtype.

        Returns:
            The velocity, shaped like x_t.

        Raises:
            TypeError: `x_t`, `cond` or one of its entries is not a tensor. There is no unconditional call: pass the
                empty prompt's condition.
            ValueError: a shape does not fit, or entries of `cond` are missing or unknown.
        """
        transformer, backbone = find_transformer(self.transformer)
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t: expected noisy latents, got {type(x_t).__name__}")
        if x_t.dim() != 5:
            raise ValueError(f"x_t: expected five dimensions, got shape {tuple(x_t.shape)}")
        config: Any = transformer.config
        if x_t.shape[self.channel_dim] != config.in_channels:
            raise ValueError(
                f"x_t: expected {config.in_channels} channels in dimension {self.channel_dim}, "
                f"got shape {tuple(x_t.shape)}"
            )
        batch = x_t.shape[0]
        cond = _checked_condition(backbone, cond, batch)
        t = torch.as_tensor(t, device=x_t.device)
        if t.dim() > 1 or t.numel() not in (1, batch):
            raise ValueError(f"t: expected one timestep or ({batch},), got shape {tuple(t.shape)}")
        inputs = {
            name: (value.to(x_t.dtype) if value.is_floating_point() else value).expand(batch, *value.shape[1:])
            for name, value in cond.items()
        }
        inputs |= backbone.more_inputs(transformer, x_t, self.embedded_guidance_scale)
        return self.transformer(hidden_states=x_t, timestep=t.expand(batch), return_dict=False, **inputs)[0]


def as_velocity_model(transformer: nn.Module, *, embedded_guidance_scale: float | None = None) -> VelocityModel:
    """Turns a diffusers transformer into the callable `(x_t, t, cond) -> velocity` that the losses want.

    The transformer is held, not copied: erasers attached to either are seen by both.

    Args:
        transformer: of a supported family. A VelocityModel comes back as it is, or with another
            `embedded_guidance_scale` if one is given.
        embedded_guidance_scale: the guidance that a distilled HunyuanVideo takes as an input (configured with
            `guidance_embeds`); None for its pipeline's default, 6. Other transformers do not read it.

    Raises:
        TypeError: the transformer is of no supported family, or the scale is no number.
        ValueError: the transformer is a variant of its family that is not supported, or the scale is not finite.
    """
    if embedded_guidance_scale is not None:
        check_number("embedded_guidance_scale", embedded_guidance_scale)
        if not math.isfinite(embedded_guidance_scale):
            raise ValueError(f"embedded_guidance_scale must be finite, got {embedded_guidance_scale}")
    if isinstance(transformer, VelocityModel):
        if embedded_guidance_scale in (None, transformer.embedded_guidance_scale):
            return transformer
        transformer = transformer.transformer
    if embedded_guidance_scale is None:
        embedded_guidance_scale = backbone_of(transformer).embedded_guidance_scale or 1.0
    return VelocityModel(transformer, embedded_guidance_scale)
