"""HunyuanVideo: attention over video and text tokens, text last; the guidance scale is an input; flow matching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.families import tiny
from fastunlearn.families.base import Family, LatentSpace, PublishedModel, TokenizerInput, max_sequence_length


def _extra_inputs(transformer: nn.Module, x_t: Tensor, embedded_guidance_scale: float) -> dict[str, Any]:
    config: Any = transformer.config
    if not config.guidance_embeds:
        return {}
    # Rounded to the model's dtype before it is multiplied, as in diffusers' pipeline.
    return {"guidance": x_t.new_full(x_t.shape[:1], embedded_guidance_scale) * 1000.0}


def _encode(pipeline: Any, prompt: str, length: int) -> dict[str, Tensor]:
    embeddings, pooled, mask = pipeline.encode_prompt(prompt, max_sequence_length=length)
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "pooled_projections": pooled}


def _tokenizer_input(prompt: str) -> TokenizerInput:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as DEFAULT

    return TokenizerInput(prompt, DEFAULT["template"], DEFAULT["crop_start"])


def _set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    sigmas = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64, device="cpu")[:-1].tolist()
    scheduler.set_timesteps(sigmas=sigmas, device=device)


def _tiny_transformer(**configuration: Any) -> Any:
    """One double-stream block and two single-stream blocks."""
    from diffusers import HunyuanVideoTransformer3DModel

    defaults = {
        "in_channels": tiny.CHANNELS,
        "out_channels": tiny.CHANNELS,
        "num_attention_heads": tiny.HEADS,
        "attention_head_dim": tiny.HEAD_DIM,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": tiny.TEXT_DIM,
        "pooled_projection_dim": tiny.TEXT_DIM,
        "rope_axes_dim": (4, 6, 6),
    }
    return tiny.with_default_size(HunyuanVideoTransformer3DModel(**defaults | configuration))


def _tiny_pipeline() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    template: str = DEFAULT_PROMPT_TEMPLATE["template"]
    tokenizer, tokenizer_2 = tiny.llama_tokenizer(template), tiny.clip_tokenizer()
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=tiny.TEXT_DIM,
            intermediate_size=37,
            num_hidden_layers=4,  # the pipeline skips the last two layers
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.5,
        )
    )
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer_2),
            hidden_size=tiny.TEXT_DIM,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=tiny.TEXT_DIM,
            bos_token_id=tokenizer_2.bos_token_id,
            eos_token_id=tokenizer_2.eos_token_id,
            pad_token_id=tokenizer_2.pad_token_id,
            initializer_factor=10.0,
        )
    )
    transformer = _tiny_transformer()
    return HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2.eval(),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=tiny.CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ).eval(),
        transformer=tiny.sharpen(transformer, tiny.VALUE_GAIN),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


_ATTENTIONS = (("transformer_blocks", "attn"), ("single_transformer_blocks", "attn"))

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    transformer="HunyuanVideoTransformer3DModel",
    erased=_ATTENTIONS,
    text_attended=_ATTENTIONS,
    text_position="last",
    channel_dim=1,
    conditions={
        "encoder_hidden_states": ("L", "D"),
        "encoder_attention_mask": ("L",),
        "pooled_projections": ("P",),
    },
    condition_sizes=lambda config: {"D": config.text_embed_dim, "P": config.pooled_projection_dim},
    extra_inputs=_extra_inputs,
    embedded_guidance_scale=6.0,
    supported_config={"image_condition_type": None},
    pipeline="HunyuanVideoPipeline",
    text_components=("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
    encode=_encode,
    text_length=max_sequence_length,
    tokenizer_input=_tokenizer_input,
    vae="AutoencoderKLHunyuanVideo",
    latent_space=lambda config: LatentSpace(
        frames=config["temporal_compression_ratio"],
        pixels=config["spatial_compression_ratio"],
        std=1 / config["scaling_factor"],
    ),
    flow_matching=True,
    guidance_scale=1.0,  # guidance-distilled: no classifier-free guidance
    fps=15,
    set_timesteps=_set_timesteps,
    published=(
        PublishedModel(
            name="HunyuanVideo",
            video="720x1280x129",
            parameters=12.8e9,
            text_encoder_parameters=8.15e9,
            blocks=60,
            features=3072,
            video_tokens=33 * 45 * 80,
            text_tokens=256,
            latent_elements=16 * 33 * 90 * 160,
        ),
    ),
    tiny_transformer=_tiny_transformer,
    tiny_pipelines={"hunyuan_video": _tiny_pipeline},
)
