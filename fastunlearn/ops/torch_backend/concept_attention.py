"""Concept attention in bounded memory: the logits of a block of queries at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.ops.torch_backend.blocks import blocks_of

# Float32 temporaries of 4 MB: small enough for a CPU's cache, large enough for few launches on a GPU.
BLOCK_ELEMENTS = 2**20


@torch.no_grad()
def concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
    is_compiled: bool = False,
) -> Tensor:
    """The softmax probabilities of the keys in `token_indices` (B, T), summed over these, averaged over heads."""
    # A compiler would unroll the loop over blocks, which takes minutes for a hundred blocks.
    is_compiling = is_compiled or torch.compiler.is_compiling()
    compute = _opaque_concept_attention if is_compiling else _concept_attention
    return compute(query, key, token_indices, float(scale), key_mask, lse)


def _concept_attention(
    query: Tensor, key: Tensor, token_indices: Tensor, scale: float, key_mask: Tensor | None, lse: Tensor | None
) -> Tensor:
    batch, heads, queries, channels = query.shape
    keys, tokens = key.shape[2], token_indices.shape[1]
    dtype = compute_dtype(query, key, lse)
    is_chosen = (token_indices >= 0) & (token_indices < keys)
    index = token_indices.clamp(0, keys - 1)
    if key_mask is not None:
        is_chosen = is_chosen & key_mask.gather(1, index)
    largest_row = max(channels, tokens, keys)
    if lse is not None:
        key = key.gather(2, index[:, None, :, None].expand(batch, heads, tokens, channels)).to(dtype) * scale
        # With few logits per query, the largest temporary is the converted queries, if they need converting.
        largest_row = max(tokens, 1 if query.dtype == dtype else channels)
    probability = torch.zeros(batch, queries, dtype=dtype, device=query.device)

    for block in blocks_of((batch, heads, queries), max(BLOCK_ELEMENTS // largest_row, 1)):
        samples, some_heads, rows = (*block, *[slice(None)] * 3)[:3]
        # Autocast would compute the product in half precision.
        with torch.autocast(query.device.type, enabled=False):
            q = query[samples, some_heads, rows].to(dtype)
            logits = (q if lse is not None else q * scale) @ key[samples, some_heads].to(dtype).mT
        if lse is not None:
            p = (logits - lse[samples, some_heads, rows, None].to(dtype)).exp()
        else:
            if key_mask is not None:
                logits = logits.masked_fill(~key_mask[samples, None, None], -math.inf)
            p = logits.softmax(-1).gather(-1, index[samples, None, None].expand(*logits.shape[:3], tokens))
        p = p.masked_fill(~is_chosen[samples, None, None], 0)
        probability[samples, rows] += p.sum((1, 3))
    return (probability / heads).float()


_opaque_concept_attention = torch.library.custom_op(
    "fastunlearn::torch_concept_attention",
    _concept_attention,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor token_indices, float scale, Tensor? key_mask, Tensor? lse) -> Tensor",
)


@_opaque_concept_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], dtype=torch.float32)
