"""Transformers small enough for a laptop: two blocks, four heads of sixteen, 48 video tokens after 16 text tokens."""

import torch
from diffusers import CogVideoXTransformer3DModel

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


def train_a_little(erasers, seed=2):
    """Gives erasers weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for eraser in erasers.values():
            for parameter in eraser.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
