"""The registered operators: what compilers see of the kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastunlearn.kernels.concept_attention import concept_attention_op
from fastunlearn.kernels.localization import localization_loss_op
from fastunlearn.kernels.low_rank import low_rank_localization_loss_op
from fastunlearn.kernels.velocity import velocity_loss_op
from fastunlearn.testing import low_rank_outputs, random_mask, random_tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalization", ["all", "mask"])
def test_opcheck_velocity(dtype: torch.dtype, reduction: str, normalization: str) -> None:
    inputs = random_tensors((2, 3, 4, 5), [dtype] * 3)
    for wanted in itertools.product([True, False], repeat=3):
        for x, is_wanted in zip(inputs, wanted, strict=True):
            x.requires_grad_(is_wanted)
        options = (list(wanted), 3.0, 1, "l2", reduction, normalization, 0.5)
        torch.library.opcheck(velocity_loss_op, (*inputs, random_mask("soft", (2, 2, 5)), torch.rand(2), *options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("normalization", ["sum", "background_mean"])
def test_opcheck_localization(dtype: torch.dtype, normalization: str) -> None:
    outputs = [random_tensors(shape, [dtype])[0] for shape in [(2, 6, 5)] * 3 + [(2, 3, 4, 4)]]
    masks = [random_mask("soft", (2, 6))] * 3 + [random_mask("bool", (1, 2, 2))]
    wanted = [True, False, True, True]
    for x, is_wanted in zip(outputs, wanted, strict=True):
        x.requires_grad_(is_wanted)
    torch.library.opcheck(localization_loss_op, (outputs, masks, wanted, "l1", normalization, 0.5))


@pytest.mark.parametrize("normalization", ["sum", "background_mean"])
def test_opcheck_low_rank_localization(normalization: str) -> None:
    outputs = low_rank_outputs(3, (2, 6), 9, 5, torch.bfloat16, weight_dtype=torch.float32)
    tensors = [x for output in outputs for x in output]
    tensors[5] = None
    for i, x in enumerate(tensors):
        if x is not None and i != 1:
            x.requires_grad_()
    masks = [random_mask("soft", (2, 6))] * 2 + [random_mask("bool", (1, 6))]
    torch.library.opcheck(low_rank_localization_loss_op, (tensors, masks, normalization, 0.5))


@pytest.mark.parametrize("lse", [None, torch.zeros(2, 3, 7)])
def test_opcheck_concept_attention(lse: torch.Tensor | None) -> None:
    query, key = (random_tensors((2, 3, n, 16), [torch.float32])[0] for n in (7, 9))
    arguments = (query, key, torch.tensor([[0, 3], [8, -1]]), 0.25, random_mask("bool", (2, 9)), lse)
    torch.library.opcheck(concept_attention_op, arguments)
