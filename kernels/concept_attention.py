"""Concept attention: softmax probabilities of a few keys, averaged over heads, without a queries x keys matrix.

    result[b, q] = 1 / H * sum over heads and chosen keys j of exp(scale * query . key_j - lse[b, h, q])

lse is the natural logarithm of the softmax's denominator. Floor, if it is given: every query and the chosen keys read
once, one number per query written. If it is not, a streaming softmax computes it from one product of queries and keys,
none of which is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.dtypes import compute_dtype
from fastunlearn.kernels.launch import launch_options, on_device, readable

# The smallest dimension of a `tl.dot`.
SMALLEST_DOT = 16
BLOCK_TOKENS = SMALLEST_DOT
# Enough to fill any GPU: heads are divided among programs until there are this many.
ENOUGH_PROGRAMS = 512


@triton.jit
def softmax_denominator(
    query,  # (BLOCK_QUERIES, BLOCK_CHANNELS)
    key_ptr,  # (keys, CHANNELS), of this sample and head
    key_row_stride,
    key_mask_ptr,  # (keys,), of this sample, or None
    key_mask_stride,
    scale,
    keys,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Return the largest logit `scale * query . key`, and the sum over all keys of exp(logit - largest), in one pass.

    They are returned apart because a log-sum-exp of both would be rounded to the precision of the largest logit.
    """
    channels = tl.arange(0, BLOCK_CHANNELS)
    largest = tl.full((BLOCK_QUERIES,), -float("inf"), scale.dtype)
    total = tl.zeros((BLOCK_QUERIES,), scale.dtype)
    for first in range(0, keys, BLOCK_KEYS):
        row = first + tl.arange(0, BLOCK_KEYS)
        is_attended = row < keys
        # (BLOCK_CHANNELS, BLOCK_KEYS)
        key_offsets = row.to(tl.int64)[None, :] * key_row_stride + channels[:, None]
        key = tl.load(key_ptr + key_offsets, is_attended[None, :] & (channels < CHANNELS)[:, None], 0)
        if key_mask_ptr is not None:
            is_attended = is_attended & (tl.load(key_mask_ptr + row * key_mask_stride, is_attended, 0) != 0)
        logits = tl.dot(query, key.to(DTYPE), input_precision="ieee").to(scale.dtype) * scale
        logits = tl.where(is_attended[None, :], logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # While no key is attended, largest - larger would be inf - inf = NaN.
        base = tl.where(larger == -float("inf"), 0, larger)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        largest = larger
    return tl.where(largest == -float("inf"), 0, largest), total


@triton.jit
def concept_attention_kernel(
    partial_ptr,  # (groups, B, Sq) out: sums over a group's heads, divided by all heads
    query_ptr,  # (B, H, Sq, CHANNELS), channels contiguous
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_ptr,  # (B, H, Sk, CHANNELS), channels contiguous
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    token_ptr,  # (B, tokens) int64: the chosen keys; an index out of range chooses none
    token_batch_stride,
    token_stride,
    key_mask_ptr,  # (B, Sk): 0 where not attended, or None
    key_mask_batch_stride,
    key_mask_stride,
    lse_ptr,  # (B, H, Sq), or None
    lse_batch_stride,
    lse_head_stride,
    lse_row_stride,
    scale: tl.float64,
    batch,
    heads,
    heads_per_group,
    queries,
    keys,
    tokens,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the factors of matrix products
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Process query block `program_id(0)` and head group `program_id(1)` of sample `program_id(2)`."""
    group, sample = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    dtype = partial_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    in_bounds = row < queries
    row = row.to(tl.int64)
    channels = tl.arange(0, BLOCK_CHANNELS)
    is_channel = channels < CHANNELS
    factor = tl.full((), scale, dtype)
    probability = tl.zeros((BLOCK_QUERIES,), dtype)

    for head in range(group * heads_per_group, tl.minimum((group + 1) * heads_per_group, heads)):
        # 1. The queries and the denominators of their softmax.
        head_offset = sample * query_batch_stride + tl.cast(head, tl.int64) * query_head_stride
        query_offsets = head_offset + row[:, None] * query_row_stride + channels[None, :]
        query = tl.load(query_ptr + query_offsets, in_bounds[:, None] & is_channel[None, :], 0).to(DTYPE)
        head_key_ptr = key_ptr + sample * key_batch_stride + tl.cast(head, tl.int64) * key_head_stride
        if lse_ptr is not None:
            head_offset = sample * lse_batch_stride + tl.cast(head, tl.int64) * lse_head_stride
            largest = tl.load(lse_ptr + head_offset + row * lse_row_stride, in_bounds, 0).to(dtype)
            denominator = tl.full((BLOCK_QUERIES,), 1, dtype)
        else:
            sample_mask_ptr = None
            if key_mask_ptr is not None:
                sample_mask_ptr = key_mask_ptr + sample * key_mask_batch_stride
            largest, denominator = softmax_denominator(
                query,
                head_key_ptr,
                key_row_stride,
                sample_mask_ptr,
                key_mask_stride,
                factor,
                keys,
                CHANNELS,
                DTYPE,
                BLOCK_QUERIES,
                BLOCK_KEYS,
                BLOCK_CHANNELS,
            )

        # 2. The probabilities of the chosen keys.
        for first in range(0, tokens, BLOCK_TOKENS):
            token = first + tl.arange(0, BLOCK_TOKENS)
            token_offsets = sample * token_batch_stride + token * token_stride
            index = tl.load(token_ptr + token_offsets, token < tokens, -1)
            is_chosen = (index >= 0) & (index < keys)
            if key_mask_ptr is not None:
                mask_offsets = sample * key_mask_batch_stride + index * key_mask_stride
                is_chosen = is_chosen & (tl.load(key_mask_ptr + mask_offsets, is_chosen, 0) != 0)
            key_offsets = index[None, :] * key_row_stride + channels[:, None]
            key = tl.load(head_key_ptr + key_offsets, is_chosen[None, :] & is_channel[:, None], 0).to(DTYPE)
            logits = tl.dot(query, key, input_precision="ieee").to(dtype) * factor
            p = tl.exp(logits - largest[:, None]) / denominator[:, None]
            probability += tl.sum(tl.where(is_chosen[None, :], p, 0), axis=1)

    sum_ptr = partial_ptr + (tl.cast(group, tl.int64) * batch + sample) * queries
    tl.store(sum_ptr + row, probability / heads, in_bounds)


def _launch(
    query: Tensor, key: Tensor, token_indices: Tensor, scale: float, key_mask: Tensor | None, lse: Tensor | None
) -> Tensor:
    batch, heads, queries, channels = query.shape
    keys, tokens = key.shape[2], token_indices.shape[1]
    dtype = compute_dtype(query, key, lse)
    factor_dtype = torch.promote_types(query.dtype, key.dtype) if dtype == torch.float32 else dtype
    if 0 in (batch, queries, tokens):
        return torch.zeros(batch, queries, device=query.device)
    query, key = (x if x.stride(3) == 1 or channels == 1 else x.contiguous() for x in (query, key))
    # Tiles that are not in half precision, or are wide, take many registers and must be smaller.
    block, warps = (64, 4) if factor_dtype.itemsize == 2 and channels <= 128 else (32, 8)
    query_blocks = triton.cdiv(queries, block)
    heads_per_group = triton.cdiv(heads, min(heads, triton.cdiv(ENOUGH_PROGRAMS, query_blocks * batch)))
    groups = triton.cdiv(heads, heads_per_group)
    partial = torch.empty(groups, batch, queries, dtype=dtype, device=query.device)
    mask = None if key_mask is None else readable(key_mask)
    with on_device(query):
        concept_attention_kernel[(query_blocks, groups, batch)](
            partial,
            query,
            *query.stride()[:3],
            key,
            *key.stride()[:3],
            token_indices,
            *token_indices.stride(),
            mask,
            *((0, 0) if mask is None else mask.stride()),
            lse,
            *((0, 0, 0) if lse is None else lse.stride()),
            float(scale),
            batch,
            heads,
            heads_per_group,
            queries,
            keys,
            tokens,
            CHANNELS=channels,
            DTYPE=_TRITON_DTYPES[factor_dtype],
            BLOCK_QUERIES=block,
            BLOCK_KEYS=block,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_CHANNELS=max(triton.next_power_of_2(channels), SMALLEST_DOT),
            # Rows that are not 16-byte aligned are prefetched in pieces, whose addresses take registers.
            num_stages=1 if channels % 16 else 2,
            **launch_options(query, warps),
        )
    return (partial[0] if groups == 1 else partial.sum(0)).float()


_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


concept_attention_op = torch.library.custom_op("fastunlearn::concept_attention", _launch, mutates_args=())


@concept_attention_op.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], dtype=torch.float32)


def concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The Triton counterpart of the `torch_backend` function: one launch."""
    tensors = (
        query.detach(),
        key.detach(),
        token_indices,
        float(scale),
        key_mask,
        None if lse is None else lse.detach(),
    )
    return concept_attention_op(*tensors) if torch.compiler.is_compiling() else _launch(*tensors)
