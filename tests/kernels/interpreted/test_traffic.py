"""The bytes that kernels move, and the number of kernels that a call launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fastunlearn import T2VUnlearningLoss
from fastunlearn.functional import (
    concept_attention,
    localization_loss,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.kernels.concept_attention import _plan
from fastunlearn.testing import low_rank_outputs, random_mask, random_tensors
from fastunlearn.testing.interpreter import Observed, observed_kernels

SHAPE = (2, 16, 4, 32, 32)
LARGE = ("prediction_ptr", "uncond_ptr", "cond_ptr", "gradient_ptrs", "result_ptrs", "output_ptrs", "losses_ptr")


def large(counter: Counter[tuple[str, str]]) -> int:
    """Bytes of tensors as large as a velocity or an eraser output."""
    return sum(n for (_, name), n in counter.items() if name in LARGE or name.startswith("gradient_"))


def small(observed: Observed) -> int:
    """Bytes of everything else except masks and weights."""
    both = observed.loaded + observed.stored
    weight_bytes = sum(n for (_, name), n in both.items() if name in ("mask_ptr", "mask_ptrs", "sample_weight_ptr"))
    return sum(both.values()) - large(both) - weight_bytes


def velocities(count: int, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    tensors = [torch.randn(shape).to(dtype) for _ in range(count)]
    tensors[0].requires_grad_()
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", [None, (1, 4, 16, 16), (2, 4, 32, 32)])
def test_velocity_losses_move_the_floor(dtype: torch.dtype, mask: tuple[int, ...] | None) -> None:
    options: dict[str, Any] = {} if mask is None else {"mask": torch.rand(mask) > 0.5}
    for count in (2, 3):
        tensors = velocities(count, dtype)
        size = tensors[0].numel() * tensors[0].element_size()
        with observed_kernels() as observed:
            loss = velocity_loss if count == 2 else negatively_guided_velocity_loss
            loss(*tensors, **options).loss.backward()
        assert large(observed.loaded) == count * size
        assert large(observed.stored) == size
        assert observed.launches == ["velocity_forward_kernel", "velocity_finish_kernel", "scale_gradients_kernel"]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_without_a_gradient_nothing_is_written(requires_grad: bool) -> None:
    tensors = [x.detach().requires_grad_(requires_grad) for x in velocities(3, torch.float32)]
    outputs = [torch.randn(2, 128, 64, requires_grad=requires_grad)]
    with torch.set_grad_enabled(not requires_grad), observed_kernels() as observed:
        loss = negatively_guided_velocity_loss(*tensors).loss
        localization_loss(outputs, torch.zeros(2, 128))
    assert not loss.requires_grad
    assert large(observed.loaded) == 3 * 4 * tensors[0].numel() + 4 * outputs[0].numel()
    assert large(observed.stored) == 0
    assert len(observed.launches) == 4


def test_sums_and_scalars_are_under_a_hundredth() -> None:
    tensors = velocities(3, torch.float32, (1, 16, 16, 64, 64))
    with observed_kernels() as observed:
        negatively_guided_velocity_loss(*tensors).loss.backward()
    assert small(observed) < 0.01 * 4 * 4 * tensors[0].numel()


def test_permuted_velocities_are_not_copied() -> None:
    tensors = [x.detach().permute(0, 2, 1, 3, 4).requires_grad_() for x in velocities(2, torch.float32)]
    before = [x.data_ptr() for x in tensors]
    with observed_kernels() as observed:
        velocity_loss(*tensors).loss.backward()
    assert large(observed.loaded) == 2 * 4 * tensors[0].numel()
    assert [x.data_ptr() for x in tensors] == before
    assert not any(name == "elsewhere" for _, name in observed.loaded)


@pytest.mark.parametrize("layers", [1, 3])
def test_localization_reads_only_the_background(layers: int) -> None:
    mask = torch.rand(2, 128) > 0.5
    outputs = [torch.randn(2, 128, 64, requires_grad=True) for _ in range(layers)]
    with observed_kernels() as observed:
        localization_loss(outputs, mask).loss.backward()
    assert large(observed.loaded) == layers * int((~mask).sum()) * 64 * 4
    assert large(observed.stored) == layers * outputs[0].numel() * 4
    kernels = ["localization_forward_kernel", "localization_finish_kernel", "scale_gradients_kernel"]
    assert observed.launches == kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [16, 128])
def test_low_rank_localization_reads_hidden_states_once_per_pass(dtype: torch.dtype, rank: int) -> None:
    mask = random_mask("bool", (2, 96))
    outputs = low_rank_outputs(2, (2, 96), 160, rank, dtype, weight_dtype=torch.float32)
    for x in (x for output in outputs for x in output):
        x.requires_grad_()
    size = 2 * int((~mask).sum()) * rank * dtype.itemsize
    parameters = 2 * 160 * rank * 4
    with observed_kernels() as observed:
        loss = localization_loss(outputs, mask).loss
    kernels = ["moments_kernel", "moments_kernel", "moments_finish_kernel", "localization_finish_kernel"]
    assert observed.launches == kernels
    assert observed.loaded["moments_kernel", "x_ptrs"] == size + parameters
    with observed_kernels() as observed:
        loss.backward()
    assert observed.launches == ["gradient_rows_kernel"] * 2
    assert observed.loaded["gradient_rows_kernel", "x_ptrs"] == size + parameters
    assert observed.stored["gradient_rows_kernel", "result_ptrs"] == 2 * 2 * 96 * rank * dtype.itemsize + parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_concept_attention_with_lse_reads_queries_once_and_the_chosen_keys(dtype: torch.dtype) -> None:
    query, key = random_tensors((2, 3, 200, 64), [dtype] * 2)
    tokens = torch.tensor([3, 7, -1])
    for lse in (torch.zeros(2, 3, 200), None):
        with observed_kernels() as observed:
            concept_attention(query, key, tokens, lse=lse)
        loaded = {name: n for (_, name), n in observed.loaded.items()}
        assert observed.launches == ["concept_attention_kernel"]
        assert loaded["query_ptr"] == query.nbytes
        block = 32 if dtype == torch.float32 else 128 if lse is None else 64
        # Each block of queries reads the keys; all blocks but the first find them in a cache.
        bytes_per_block = 2 * 3 * 64 * dtype.itemsize * (2 if lse is not None else 202)
        assert loaded["key_ptr"] == -(-200 // block) * bytes_per_block


def test_concept_attention_plans_calls_of_the_same_layouts_once() -> None:
    query, key = random_tensors((1, 2, 40, 16), [torch.bfloat16] * 2)
    _plan.cache_clear()
    for _ in range(3):
        concept_attention(query, key, [3, 7])
    concept_attention(query, key, [5, 1], scale=0.1)
    assert (_plan.cache_info().misses, _plan.cache_info().hits) == (1, 3)
    concept_attention(query, key[:, :, 1:], [3, 7])
    concept_attention(query.float(), key, [3, 7])
    concept_attention(query, key, [3, 7], lse=torch.zeros(1, 2, 40))
    concept_attention(query, key, [3, 7], key_mask=torch.ones(1, 40, dtype=torch.bool))
    assert _plan.cache_info().misses == 5


@pytest.mark.parametrize(("layers", "forward"), [(2, 6), (16, 6), (18, 7), (40, 8)])
def test_the_combined_loss_launches_few_kernels(layers: int, forward: int) -> None:
    parameter = torch.zeros(2, 48, 16, requires_grad=True)
    loss_fn = T2VUnlearningLoss(torch.linspace(1, 0, 1000), preservation_weight=0.5, localization_weight=2.0)
    x_t, t, cond = torch.randn(2, 4, 3, 4, 4), torch.tensor([1, 2]), torch.randn(2, 3, 8)

    def student(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x + parameter.mean()

    with observed_kernels() as observed:
        loss, _ = loss_fn(
            student,
            student,
            x_t,
            t,
            cond,
            cond,
            uncond=cond,
            mask=torch.rand(2, 3, 4, 4),
            eraser_outputs={str(i): parameter + i for i in range(layers)},
        )
    assert len(observed.launches) == forward
    with observed_kernels() as observed:
        loss.backward()
    # The terms' weights are part of the written gradients, so every upstream gradient is 1 and nothing is read.
    assert observed.launches == ["scale_gradients_kernel"] * 3
    assert not large(observed.loaded) and not large(observed.stored)
