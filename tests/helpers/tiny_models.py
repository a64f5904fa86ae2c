"""Transformers small enough for a laptop: two or three blocks of four heads, 48 video tokens, 16 text tokens.

Tests that are about no particular family use `cogvideox`. `FAMILIES` has a row for each family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastunlearn import families
from fastunlearn.families.tiny import sharpen

LAYERS = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
TEXT, VIDEO, HEADS, DIM = 16, 48, 4, 64
GRID = (3, 4, 4)


def cogvideox(rope=False, seed=0, **configuration):
    """Random weights; every head attends sharply, and to something else."""
    torch.manual_seed(seed)
    configuration = {"max_text_seq_length": TEXT, "use_rotary_positional_embeddings": rope} | configuration
    return sharpen(families.COGVIDEOX.tiny_transformer(**configuration))


def inputs(batch=2, dtype=torch.float32, seed=1):
    """(x_t, t, cond) for `cogvideox`."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 3, 4, 8, 8, generator=generator).to(dtype)
    cond = torch.randn(batch, TEXT, 32, generator=generator).to(dtype)
    return x_t, torch.arange(1, batch + 1) * 100, cond


def hunyuan_video(seed=0, **configuration):
    """One double-stream block, two single-stream blocks."""
    torch.manual_seed(seed)
    return sharpen(families.HUNYUAN_VIDEO.tiny_transformer(**{"pooled_projection_dim": 8} | configuration))


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


def wan(seed=0, **configuration):
    """Two blocks of self- and cross-attention."""
    torch.manual_seed(seed)
    return sharpen(families.WAN.tiny_transformer(**configuration))


def wan_inputs(batch=2, dtype=torch.float32, seed=1):
    """(x_t, t, cond) for `wan`."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 4, 3, 8, 8, generator=generator).to(dtype)
    cond = torch.randn(batch, TEXT, 32, generator=generator).to(dtype)
    return x_t, torch.arange(1, batch + 1) * 100, cond


@dataclass(frozen=True)
class Family:
    """A tiny transformer of one family.

    Attributes:
        name: the family's name.
        make: makes the transformer.
        inputs: makes (x_t, t, cond) to call it with.
        layers: the attentions that get erasers.
        dim: the number of features of their tokens.
        video: where the video tokens are among the queries of an attention to the text.
        text: where the text tokens are among its keys.
    """

    name: str
    make: Callable[..., Any]
    inputs: Callable[..., Any]
    layers: list[str]
    dim: int
    video: slice
    text: slice

    def __str__(self):
        return self.name


FAMILIES = [
    Family("cogvideox", partial(cogvideox, rope=True), inputs, LAYERS, DIM, slice(TEXT, None), slice(0, TEXT)),
    Family(
        "hunyuan_video",
        hunyuan_video,
        hunyuan_video_inputs,
        ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
        64,
        slice(0, VIDEO),
        slice(VIDEO, None),
    ),
    Family("wan", wan, wan_inputs, ["blocks.0.attn2", "blocks.1.attn2"], 48, slice(None), slice(None)),
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
