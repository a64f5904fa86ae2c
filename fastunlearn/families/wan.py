"""Wan: 2.1, and 2.2 A14B with two transformers. Cross-attention to the text; flow matching."""

from __future__ import annotations

from typing import Any

import torch

from fastunlearn.families import tiny
from fastunlearn.families.base import (
    Family,
    LatentSpace,
    PublishedModel,
    TokenizerInput,
    encode_t5,
    max_sequence_length,
)


def _tokenizer_input(prompt: str) -> TokenizerInput:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return TokenizerInput(prompt_clean(prompt))


def _tiny_transformer(**configuration: Any) -> Any:
    from diffusers import WanTransformer3DModel

    defaults = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": tiny.HEADS,
        "attention_head_dim": 12,
        "in_channels": tiny.CHANNELS,
        "out_channels": tiny.CHANNELS,
        "text_dim": tiny.TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return tiny.with_default_size(WanTransformer3DModel(**defaults | configuration))


def _tiny_pipeline(experts: int = 1) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5EncoderModel

    tokenizer = tiny.t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(tiny.t5_config("UMT5Config", len(tokenizer))).eval(),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=tiny.CHANNELS,
            num_res_blocks=1,
            latents_mean=[-0.7, 0.3, 0.1, -0.2],
            latents_std=[2.8, 1.4, 0.6, 2.1],
        ).eval(),
        transformer=tiny.sharpen(_tiny_transformer(), tiny.VALUE_GAIN),
        transformer_2=tiny.sharpen(_tiny_transformer(), tiny.VALUE_GAIN) if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


_CROSS_ATTENTIONS = (("blocks", "attn2"),)  # attn1 is self-attention over video tokens

_WAN_14B = PublishedModel(
    name="Wan2.1-14B",
    video="480x832x81",
    parameters=14.29e9,
    text_encoder_parameters=5.68e9,
    blocks=40,
    features=5120,
    video_tokens=21 * 30 * 52,
    text_tokens=0,
    latent_elements=16 * 21 * 60 * 104,
)

WAN = Family(
    name="wan",
    transformer="WanTransformer3DModel",
    erased=_CROSS_ATTENTIONS,
    text_attended=_CROSS_ATTENTIONS,
    text_position="cross",
    channel_dim=1,
    conditions={"encoder_hidden_states": ("L", "D")},
    condition_sizes=lambda config: {"D": config.text_dim},
    supported_config={"image_dim": None, "added_kv_proj_dim": None},
    pipeline="WanPipeline",
    denoisers=("transformer", "transformer_2"),
    encode=encode_t5,
    text_length=max_sequence_length,
    tokenizer_input=_tokenizer_input,
    vae="AutoencoderKLWan",
    vae_dtype=torch.float32,  # as diffusers' example of this pipeline loads it, next to a bfloat16 transformer
    latent_space=lambda config: LatentSpace(
        frames=config["scale_factor_temporal"],
        pixels=config["scale_factor_spatial"],
        mean=tuple(config["latents_mean"]),
        std=tuple(config["latents_std"]),
    ),
    flow_matching=True,
    guidance_scale=5.0,
    fps=16,
    largest_grid=lambda config: (config.rope_max_seq_len,) * 3,
    unsupported_options={"expand_timesteps": "one timestep per token, as in Wan2.2-TI2V-5B"},
    published=(
        _WAN_14B._replace(name="Wan2.1-1.3B", parameters=1.42e9, blocks=30, features=1536),
        _WAN_14B,
        _WAN_14B._replace(name="Wan2.2-A14B", transformers=2),
    ),
    tiny_transformer=_tiny_transformer,
    tiny_pipelines={
        "wan": _tiny_pipeline,  # like 2.1
        "wan-2.2": lambda: _tiny_pipeline(experts=2),  # like A14B: two transformers, boundary_ratio 0.875
    },
)
