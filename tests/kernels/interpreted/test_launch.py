"""The pieces that all kernels share: 64-bit offsets, broadcasting, layouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn.cli import main
from fastunlearn.kernels import launch
from fastunlearn.kernels.launch import (
    broadcast_index,
    broadcast_offsets,
    is_dense,
    same_layout,
    tile_count,
    tile_start,
)


@triton.jit
def tile_start_kernel(result_ptr, tile, BLOCK: tl.constexpr):
    tl.store(result_ptr, tile_start(tile, BLOCK))


@triton.jit
def tile_count_kernel(result_ptr, elements, BLOCK: tl.constexpr):
    tl.store(result_ptr, tile_count(elements, BLOCK))


@triton.jit
def broadcast_kernel(
    result_ptr,
    operand_ptr,
    strides,
    elements,
    DIM_SIZES: tl.constexpr,
    OPERAND_SIZES: tl.constexpr,
    IN_32_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    in_bounds = offsets < elements
    operand_offsets = broadcast_offsets(offsets, strides, DIM_SIZES, OPERAND_SIZES, IN_32_BITS)
    tl.store(result_ptr + offsets, tl.load(operand_ptr + operand_offsets, in_bounds, 0), in_bounds)


def test_offsets_are_64_bit() -> None:
    result = torch.zeros(1, dtype=torch.int64)
    tile_start_kernel[(1,)](result, 2**21, BLOCK=2048)
    assert result.item() == 2**32


@pytest.mark.parametrize(
    "elements", [1, 2047, 2048, 2049, 2**31 - 2049, 2**31 - 2048, 2**31 - 2047, 2**31 - 1, 2**31, 2**33 + 1]
)
def test_tiles_are_counted_on_both_sides_of_two_to_the_31(elements: int) -> None:
    """`tl.cdiv` adds the tile's size first, in the 32 bits of its argument, and so counts none just below 2^31."""
    result = torch.zeros(1, dtype=torch.int64)
    tile_count_kernel[(1,)](result, elements, BLOCK=2048)
    assert result.item() == -(-elements // 2048)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    operand_sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    kinds=st.lists(st.sampled_from(["same", "one", "expanded", "other"]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_broadcasting_reads_what_interpolate_reads(
    shape: list[int], operand_sizes: list[int], kinds: list[str], seed: int
) -> None:
    """For any order of dims in memory, of the tensor and of the operand, and any mix of resolutions."""
    order = torch.randperm(len(shape), generator=torch.Generator().manual_seed(seed)).tolist()
    x = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    assert list(x.shape) == shape and is_dense(x)
    sizes = [
        {"same": size, "one": 1, "expanded": 1, "other": other}[kind]
        for size, other, kind in zip(shape, operand_sizes, kinds, strict=False)
    ]
    operand = torch.rand(sizes[::-1]).permute(*range(len(sizes))[::-1])
    operand = operand.expand([n if kind == "expanded" else -1 for n, kind in zip(shape, kinds, strict=False)])
    index = broadcast_index(x.shape, x.stride(), operand.shape, operand.stride())
    result = torch.empty_like(x)
    broadcast_kernel[(1,)](
        result,
        operand,
        index.strides,
        x.numel(),
        DIM_SIZES=index.DIM_SIZES,
        OPERAND_SIZES=index.OPERAND_SIZES,
        IN_32_BITS=index.IN_32_BITS,
        BLOCK=triton.next_power_of_2(x.numel()),
    )
    expected = operand
    for dim, size in enumerate(shape):
        moved = expected.movedim(dim, -1)
        flat = moved.reshape(1, -1, moved.shape[-1])
        read = F.interpolate(flat, size=size, mode="nearest").reshape(*moved.shape[:-1], size)
        expected = read.movedim(-1, dim)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("is_copied", [False, True])
def test_layouts_that_agree_are_not_copied(is_copied: bool) -> None:
    first = torch.randn(2, 3, 4).permute(2, 0, 1)
    second = torch.randn(4, 2, 3) if is_copied else torch.randn(2, 3, 4).permute(2, 0, 1)
    laid_out = same_layout(first, [second, None])
    assert laid_out[0] is first
    assert (laid_out[1] is second) is not is_copied
    assert torch.equal(laid_out[1], second)
    assert laid_out[1].stride() == first.stride()
    assert laid_out[2] is None


def test_verify_says_that_kernels_were_interpreted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "--device", "cpu", "--op", "concept_attention", "--dtype", "bfloat16", "--backend", "triton"])
    out = capsys.readouterr().out
    assert "not run" not in out
    assert out.endswith("cases passed on cpu, kernels in Triton's interpreter\n")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_bfloat16_is_made_exact_wherever_the_tensors_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(launch, "make_bfloat16_exact", lambda: calls.append(None))
    tensor: Any = SimpleNamespace(device=torch.device(device))
    launch.on_device(tensor)
    assert calls
