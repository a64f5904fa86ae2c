"""Concept attention: softmax probabilities of a few keys, averaged over heads, without a queries x keys matrix.

    result[b, q] = 1 / H * sum over heads and chosen keys j of exp(scale * query . key_j - lse[b, h, q])

lse is the natural logarithm of the softmax's denominator. Floor, if it is given: every query and the chosen keys read
once, one number per query written. If it is not, a streaming softmax computes it from one product of queries and keys,
none of which is stored. Then the floor is the time of that product's exponentials: 16 a cycle on each multiprocessor.

Logits are computed to base 2, which is what the hardware's exponential takes: their scale has log2(e) in it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunlearn.kernels.launch import MAX_REGISTERS, launch_options, on_device, readable

# The smallest dimension of a `tl.dot`.
SMALLEST_DOT = 16
BLOCK_TOKENS = SMALLEST_DOT
BLOCK_MASK = 1024
# Heads are divided among programs until there are this many. They run in 14 or more waves on any GPU of today, of which
# the last, where multiprocessors run out of work, is at most 7 % of the time.
ENOUGH_PROGRAMS = 8192
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def leading_attended_keys(key_mask_ptr, key_mask_stride, keys, BLOCK: tl.constexpr):
    """The number of keys before the first that is not attended."""
    first_masked = tl.full((BLOCK,), 0, tl.int32) + keys
    for first in range(0, keys, BLOCK):
        row = first + tl.arange(0, BLOCK)
        is_attended = tl.load(key_mask_ptr + row * key_mask_stride, row < keys, 1) != 0
        first_masked = tl.minimum(first_masked, tl.where(is_attended, keys, row))
    return tl.min(first_masked)


@triton.jit
def softmax_denominator(
    query,  # (BLOCK_QUERIES, BLOCK_CHANNELS)
    key_ptr,  # (keys, CHANNELS), of this sample and head
    key_row_stride,
    key_mask_ptr,  # (keys,), of this sample, or None
    key_mask_stride,
    scale,  # not negative
    whole_keys,  # the first keys, in whole blocks, that need no masks
    keys,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Return the largest logit `scale * query . key`, and the sum over all keys of 2^(logit - largest), in one pass.

    They are returned apart because a log-sum-exp of both would be rounded to the precision of the largest logit.
    """
    channels = tl.arange(0, BLOCK_CHANNELS)
    largest = tl.full((BLOCK_QUERIES,), -float("inf"), scale.dtype)
    total = tl.zeros((BLOCK_QUERIES,), scale.dtype)
    for first in range(0, whole_keys, BLOCK_KEYS):
        row = first + tl.arange(0, BLOCK_KEYS)
        # (BLOCK_CHANNELS, BLOCK_KEYS)
        key_offsets = row.to(tl.int64)[None, :] * key_row_stride + channels[:, None]
        key = tl.load(key_ptr + key_offsets, (channels < CHANNELS)[:, None], 0)
        products = tl.dot(query, key.to(DTYPE), input_precision="ieee").to(scale.dtype)
        # Scaled after the maximum, and then in the subtraction, as one multiply-add.
        larger = tl.maximum(largest, tl.max(products, axis=1) * scale)
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(products * scale - larger[:, None]), axis=1)
        largest = larger
    for first in range(whole_keys, keys, BLOCK_KEYS):
        row = first + tl.arange(0, BLOCK_KEYS)
        is_attended = row < keys
        key_offsets = row.to(tl.int64)[None, :] * key_row_stride + channels[:, None]
        key = tl.load(key_ptr + key_offsets, is_attended[None, :] & (channels < CHANNELS)[:, None], 0)
        if key_mask_ptr is not None:
            is_attended = is_attended & (tl.load(key_mask_ptr + row * key_mask_stride, is_attended, 0) != 0)
        logits = tl.dot(query, key.to(DTYPE), input_precision="ieee").to(scale.dtype) * scale
        logits = tl.where(is_attended[None, :], logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # While no key is attended, largest - larger would be inf - inf = NaN.
        base = tl.where(larger == -float("inf"), 0, larger)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        largest = larger
    has_keys = largest > -float("inf")
    return tl.where(has_keys, largest, 0), tl.where(has_keys, total, 1)


@triton.jit
def concept_attention_kernel(
    partial_ptr,  # (groups, B, Sq) out: sums over a group's heads, divided by all heads
    query_ptr,  # (B, H, Sq, CHANNELS), channels contiguous
    key_ptr,  # (B, H, Sk, CHANNELS), channels contiguous
    token_ptr,  # (B, tokens) int64: the chosen keys; an index out of range chooses none
    key_mask_ptr,  # (B, Sk): 0 where not attended, or None
    lse_ptr,  # (B, H, Sq), or None
    scale: tl.float64,  # times log2(e), not negative
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    token_batch_stride,
    token_stride,
    key_mask_batch_stride,
    key_mask_stride,
    lse_batch_stride,
    lse_head_stride,
    lse_row_stride,
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
    BLOCK_MASK: tl.constexpr,
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
    sample_mask_ptr = None
    whole_keys = keys // BLOCK_KEYS * BLOCK_KEYS
    if key_mask_ptr is not None:
        sample_mask_ptr = key_mask_ptr + sample * key_mask_batch_stride
        if lse_ptr is None:
            # Masks usually end in padding: most blocks of keys need none.
            attended_keys = leading_attended_keys(sample_mask_ptr, key_mask_stride, keys, BLOCK_MASK)
            whole_keys = attended_keys // BLOCK_KEYS * BLOCK_KEYS

    for head in range(group * heads_per_group, tl.minimum((group + 1) * heads_per_group, heads)):
        # 1. The queries and the denominators of their softmax.
        head_offset = sample * query_batch_stride + tl.cast(head, tl.int64) * query_head_stride
        query_offsets = head_offset + row[:, None] * query_row_stride + channels[None, :]
        query = tl.load(query_ptr + query_offsets, in_bounds[:, None] & is_channel[None, :], 0).to(DTYPE)
        head_key_ptr = key_ptr + sample * key_batch_stride + tl.cast(head, tl.int64) * key_head_stride
        if lse_ptr is not None:
            head_offset = sample * lse_batch_stride + tl.cast(head, tl.int64) * lse_head_stride
            largest = tl.load(lse_ptr + head_offset + row * lse_row_stride, in_bounds, 0).to(dtype) * LOG2_E
            denominator = tl.full((BLOCK_QUERIES,), 1, dtype)
        else:
            largest, denominator = softmax_denominator(
                query,
                head_key_ptr,
                key_row_stride,
                sample_mask_ptr,
                key_mask_stride,
                factor,
                whole_keys,
                keys,
                CHANNELS,
                DTYPE,
                BLOCK_QUERIES,
                BLOCK_KEYS,
                BLOCK_CHANNELS,
            )

        # 2. The probabilities of the chosen keys.
        chosen = tl.zeros((BLOCK_QUERIES,), dtype)
        for first in range(0, tokens, BLOCK_TOKENS):
            token = first + tl.arange(0, BLOCK_TOKENS)
            token_offsets = sample * token_batch_stride + token * token_stride
            index = tl.load(token_ptr + token_offsets, token < tokens, -1)
            is_chosen = (index >= 0) & (index < keys)
            if key_mask_ptr is not None:
                is_chosen = is_chosen & (tl.load(sample_mask_ptr + index * key_mask_stride, is_chosen, 0) != 0)
            key_offsets = index[None, :] * key_row_stride + channels[:, None]
            key = tl.load(head_key_ptr + key_offsets, is_chosen[None, :] & is_channel[:, None], 0).to(DTYPE)
            logits = tl.dot(query, key, input_precision="ieee").to(dtype) * factor
            chosen += tl.sum(tl.where(is_chosen[None, :], tl.exp2(logits - largest[:, None]), 0), axis=1)
        probability += chosen / denominator

    sum_ptr = partial_ptr + (tl.cast(group, tl.int64) * batch + sample) * queries
    tl.store(sum_ptr + row, probability / heads, in_bounds)


class _Tile(NamedTuple):
    """The queries and keys of a block, and the launch options for it."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = MAX_REGISTERS


def _tile(dtype: torch.dtype, channels: int, is_masked: bool, has_lse: bool, capability: int) -> _Tile:
    # Rows that are not 16-byte aligned are prefetched in pieces, whose addresses take registers.
    stages = 1 if channels % 16 else 2
    if dtype.itemsize > 2 or channels > 256:
        # No tensor cores, or rows that take many registers. So do masks, for which the loop over keys is there twice.
        return _Tile(32, 16 if is_masked else 32, 8, stages)
    if channels > 128:
        return _Tile(64, 64, 8, 1)
    if has_lse:
        return _Tile(64, 64, 4, stages)
    # Every block of queries reads all keys from the L2 cache: with 128 queries a block, half as often as with 64. The
    # tensor cores of Hopper read both factors from shared memory, so half of the registers are enough there, and two
    # programs share a multiprocessor: one computes exponentials while the other multiplies.
    return _Tile(128, 64, 8, stages, 128 if capability == 9 else MAX_REGISTERS)


@functools.cache
def _capability(device: torch.device) -> int:
    """The generation of an NVIDIA GPU, 9 for Hopper; 0 of other devices."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if is_nvidia else 0


class _Plan(NamedTuple):
    """What follows from the layouts of the tensors."""

    grid: tuple[int, int, int]  # blocks of queries, groups of heads, samples
    dtype: torch.dtype
    integers: tuple[int, ...]
    options: dict[str, Any]  # the kernel's constants and the launch options


@functools.lru_cache(1024)
def _plan(
    shape: tuple[int, ...],
    query_strides: tuple[int, ...],
    query_dtype: torch.dtype,
    keys: int,
    key_strides: tuple[int, ...],
    key_dtype: torch.dtype,
    tokens: int,
    token_strides: tuple[int, ...],
    mask_strides: tuple[int, ...] | None,
    lse_strides: tuple[int, ...] | None,
    lse_dtype: torch.dtype | None,
    device: torch.device,
) -> _Plan:
    batch, heads, queries, channels = shape
    dtype = torch.float64 if torch.float64 in (query_dtype, key_dtype, lse_dtype) else torch.float32
    factor_dtype = torch.promote_types(query_dtype, key_dtype) if dtype == torch.float32 else dtype
    tile = _tile(factor_dtype, channels, mask_strides is not None, lse_strides is not None, _capability(device))
    query_blocks = triton.cdiv(queries, tile.queries)
    heads_per_group = triton.cdiv(heads, min(heads, triton.cdiv(ENOUGH_PROGRAMS, query_blocks * batch)))
    integers = (
        *query_strides[:3],
        *key_strides[:3],
        *token_strides,
        *(mask_strides or (0, 0)),
        *(lse_strides or (0, 0, 0)),
        batch,
        heads,
        heads_per_group,
        queries,
        keys,
        tokens,
    )
    options = {
        "CHANNELS": channels,
        "DTYPE": _TRITON_DTYPES[factor_dtype],
        "BLOCK_QUERIES": tile.queries,
        "BLOCK_KEYS": tile.keys,
        "BLOCK_MASK": BLOCK_MASK,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "BLOCK_CHANNELS": max(triton.next_power_of_2(channels), SMALLEST_DOT),
        "num_stages": tile.stages,
        **launch_options(torch.empty(0, device=device), tile.warps),
    }
    if "maxnreg" in options:
        options["maxnreg"] = tile.registers
    return _Plan((query_blocks, triton.cdiv(heads, heads_per_group), batch), dtype, integers, options)


def _launch(
    query: Tensor, key: Tensor, token_indices: Tensor, scale: float, key_mask: Tensor | None, lse: Tensor | None
) -> Tensor:
    batch, _, queries, channels = query.shape
    tokens = token_indices.shape[1]
    if 0 in (batch, queries, tokens):
        return torch.zeros(batch, queries, device=query.device)
    query, key = (x if x.stride(3) == 1 or channels == 1 else x.contiguous() for x in (query, key))
    if scale < 0:
        query, scale = -query, -scale
    mask = None if key_mask is None else readable(key_mask)
    plan = _plan(
        query.shape,
        query.stride(),
        query.dtype,
        key.shape[2],
        key.stride(),
        key.dtype,
        tokens,
        token_indices.stride(),
        None if mask is None else mask.stride(),
        None if lse is None else lse.stride(),
        None if lse is None else lse.dtype,
        query.device,
    )
    groups = plan.grid[1]
    partial = query.new_empty((groups, batch, queries), dtype=plan.dtype)
    with on_device(query):
        concept_attention_kernel[plan.grid](
            partial, query, key, token_indices, mask, lse, scale * LOG2_E.value, *plan.integers, **plan.options
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
    if not torch.compiler.is_compiling():
        return _launch(query, key, token_indices, scale, key_mask, lse)
    lse = None if lse is None else lse.detach()
    return concept_attention_op(query.detach(), key.detach(), token_indices, float(scale), key_mask, lse)
