"""Transformers small enough for a laptop: two or three blocks of four heads, 48 video tokens, 16 text tokens.

CogVideoX stands alone where a test is about no family in particular; `FAMILIES` has one of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel

from fastunlearn import families

LAYERS = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
TEXT, VIDEO, HEADS, DIM = 16, 48, 4, 64
GRID = (3, 4, 4)


def cogvideox(rope=False, seed=0, **overrides):
    """Random weights, scaled up so that attention is far from uniform and every head attends differently."""
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": rope,
    }
    model = CogVideoXTransformer3DModel(**config | overrides).eval()
    with torch.no_grad():
        for block in model.transformer_blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.normal_(1.5, 0.3)
    return model


def inputs(batch=2, dtype=torch.float32, seed=1):
    """(x_t, t, cond) for `cogvideox`."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 3, 4, 8, 8, generator=generator).to(dtype)
    cond = torch.randn(batch, TEXT, 32, generator=generator).to(dtype)
    return x_t, torch.arange(1, batch + 1) * 100, cond


def _sharpened(model, attentions):
    """As in `cogvideox`: random weights of the norms on queries and keys."""
    with torch.no_grad():
        for attention in attentions:
            for norm in (attention.norm_q, attention.norm_k):
                norm.weight.normal_(1.5, 0.3)
    return model.eval()


def hunyuan_video(seed=0, **overrides):
    """One double block, two single blocks."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 32,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    model = HunyuanVideoTransformer3DModel(**config | overrides)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return _sharpened(model, [block.attn for block in blocks])


def hunyuan_video_inputs(batch=2, dtype=torch.float32, seed=1):
    """(x_t, t, cond) for `hunyuan_video`; the last text is padded from its tenth token on."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 4, 3, 8, 8, generator=generator).to(dtype)
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    mask[-1, 10:] = 0
    cond = {
        "encoder_hidden_states": torch.randn(batch, TEXT, 32, generator=generator).to(dtype),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8, generator=generator).to(dtype),
    }
    return x_t, torch.arange(1, batch + 1) * 100, cond


def wan(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    model = WanTransformer3DModel(**config | overrides)
    return _sharpened(model, [attention for block in model.blocks for attention in (block.attn1, block.attn2)])


def wan_inputs(batch=2, dtype=torch.float32, seed=1):
    """(x_t, t, cond) for `wan`."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 4, 3, 8, 8, generator=generator).to(dtype)
    cond = torch.randn(batch, TEXT, 32, generator=generator).to(dtype)
    return x_t, torch.arange(1, batch + 1) * 100, cond


@dataclass(frozen=True)
class Family:
    """A tiny transformer of one family: how to make it, what to call it with, its erased layers and their width."""

    name: str
    make: Callable[..., Any]
    inputs: Callable[..., Any]
    layers: list[str]
    dim: int

    def __str__(self):
        return self.name


FAMILIES = [
    Family("cogvideox", partial(cogvideox, rope=True), inputs, LAYERS, DIM),
    Family(
        "hunyuan_video",
        hunyuan_video,
        hunyuan_video_inputs,
        ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
        64,
    ),
    Family("wan", wan, wan_inputs, ["blocks.0.attn2", "blocks.1.attn2"], 48),
]


def family_of(model):
    return next(family for family in FAMILIES if family.name == families.family_of(model).name)


def train_a_little(erasers, seed=2):
    """Gives erasers weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for eraser in erasers.values():
            for parameter in eraser.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
