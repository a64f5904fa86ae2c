"""The registered operators: what compilers see of the kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastunlearn.kernels.localization import localization_loss_op
from fastunlearn.kernels.velocity import velocity_loss_op
from fastunlearn.testing import random_mask, random_tensors


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
