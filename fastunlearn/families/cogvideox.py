"""CogVideoX: 2B, and 5B with rotary embeddings. Attention over text and video tokens, text first; predicts v."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.families import tiny
from fastunlearn.families.base import Family, LatentSpace, PublishedModel, encode_t5


def _rotary_embeddings(
    head_dim: int,
    patch: int,
    patch_t: int | None,
    trained_size: tuple[int, int],
    size: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the video tokens, equal to `CogVideoXPipeline._prepare_rotary_positional_embeddings`."""
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
@torch.inference_mode(False)  # an inference tensor in the cache would break training after sampling
def _cached_rotary_embeddings(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _rotary_embeddings(*arguments)


def _extra_inputs(transformer: nn.Module, x_t: Tensor, embedded_guidance_scale: float) -> dict[str, Any]:
    config: Any = transformer.config
    inputs: dict[str, Any] = {}
    if config.use_rotary_positional_embeddings:
        frames, _, height, width = x_t.shape[1:]
        # torch.compile makes constants of them, so it needs no cache.
        rotary = _rotary_embeddings if torch.compiler.is_compiling() else _cached_rotary_embeddings
        inputs["image_rotary_emb"] = rotary(
            config.attention_head_dim,
            config.patch_size,
            config.patch_size_t,
            (config.sample_height, config.sample_width),
            (frames, height, width),
            x_t.device,
        )
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = x_t.new_full((1,), 2.0)  # a constant in diffusers' pipeline
    return inputs


def _default_size(pipeline_class: Any, config: Any, latent_space: LatentSpace) -> tuple[int, int, int]:
    """The size that the transformer was trained with."""
    return latent_space.pixels * config.sample_height, latent_space.pixels * config.sample_width, config.sample_frames


def _largest_grid(config: Any) -> tuple[None, int | None, int | None]:
    """CogVideoX 1.5 cuts its rotary embeddings out of those of the size that it was trained with."""
    if not config.use_rotary_positional_embeddings or config.patch_size_t is None:
        return None, None, None
    return None, config.sample_height // config.patch_size, config.sample_width // config.patch_size


def _text_length(pipeline_class: Any, path: Any) -> int:
    """Read from the transformer's configuration."""
    from diffusers import CogVideoXTransformer3DModel

    return int(CogVideoXTransformer3DModel.load_config(path, subfolder="transformer")["max_text_seq_length"])


def _tiny_transformer(**configuration: Any) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    defaults = {
        "num_attention_heads": tiny.HEADS,
        "attention_head_dim": tiny.HEAD_DIM,
        "in_channels": tiny.CHANNELS,
        "out_channels": tiny.CHANNELS,
        "time_embed_dim": 32,
        "text_embed_dim": tiny.TEXT_DIM,
        "num_layers": 2,
        "sample_width": tiny.WIDTH // 8,
        "sample_height": tiny.HEIGHT // 8,
        "sample_frames": tiny.FRAMES,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
    }
    return CogVideoXTransformer3DModel(**defaults | configuration)


def _tiny_pipeline(rotary: bool = False) -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from transformers import T5EncoderModel

    tokenizer = tiny.t5_tokenizer()
    transformer = _tiny_transformer(max_text_seq_length=226, use_rotary_positional_embeddings=rotary)
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(tiny.t5_config("T5Config", len(tokenizer))).eval(),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=tiny.CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7 if rotary else 1.15258426,
        ).eval(),
        transformer=tiny.sharpen(transformer, tiny.VALUE_GAIN),
        scheduler=CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            set_alpha_to_one=True,
            snr_shift_scale=1.0 if rotary else 3.0,
        ),
    )


_ATTENTIONS = (("transformer_blocks", "attn1"),)

_COGVIDEOX_5B = PublishedModel(
    name="CogVideoX-5B",
    video="480x720x49",
    parameters=5.57e9,
    text_encoder_parameters=4.76e9,
    blocks=42,
    features=3072,
    video_tokens=13 * 30 * 45,
    text_tokens=226,
    latent_elements=13 * 16 * 60 * 90,
)

COGVIDEOX = Family(
    name="cogvideox",
    transformer="CogVideoXTransformer3DModel",
    erased=_ATTENTIONS,
    text_attended=_ATTENTIONS,
    text_position="first",
    channel_dim=2,
    conditions={"encoder_hidden_states": ("L", "D")},
    condition_sizes=lambda config: {"D": config.text_embed_dim},
    extra_inputs=_extra_inputs,
    pipeline="CogVideoXPipeline",
    encode=encode_t5,
    text_length=_text_length,
    vae="AutoencoderKLCogVideoX",
    latent_space=lambda config: LatentSpace(
        frames=int(config["temporal_compression_ratio"]),
        pixels=2 ** (len(config["block_out_channels"]) - 1),
        std=1 / config["scaling_factor"],
    ),
    flow_matching=False,
    guidance_scale=6.0,
    fps=8,
    default_size=_default_size,
    largest_grid=_largest_grid,
    float32_latents=False,
    published=(
        _COGVIDEOX_5B._replace(name="CogVideoX-2B", parameters=1.69e9, blocks=30, features=1920),
        _COGVIDEOX_5B,
    ),
    tiny_transformer=_tiny_transformer,
    tiny_pipelines={
        "cogvideox": _tiny_pipeline,  # like 2B: no rotary embeddings
        "cogvideox-rope": lambda: _tiny_pipeline(rotary=True),  # like 5B
    },
)
