"""What compilers see of the kernels: raw operators, and an autograd function around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastunlearn.functional import (
    LowRankOutput,
    localization_loss,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.kernels.concept_attention import concept_attention_op
from fastunlearn.kernels.localization import localization_loss_op
from fastunlearn.kernels.low_rank import low_rank_localization_loss_backward_op, low_rank_localization_loss_op
from fastunlearn.kernels.upstream import scale_gradients_op
from fastunlearn.kernels.velocity import velocity_loss_op
from fastunlearn.testing import low_rank_outputs, random_mask, random_tensors

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NORMALIZATIONS = ("sum", "mean", "background_mean")
# Of prediction, uncond and cond. Compilers see each needed and not needed, alone and beside others, in few compiles.
NEEDS_GRADIENT = tuple(itertools.product((True, False), repeat=3))
COMPILED_NEEDS_GRADIENT = ((True, False, False), (False, True, True), (True, True, True), (False, False, False))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalization", ["all", "mask"])
def test_opcheck_velocity(dtype: torch.dtype, reduction: str, normalization: str) -> None:
    inputs = random_tensors((2, 3, 4, 5), [dtype] * 3)
    for needs_gradient in NEEDS_GRADIENT:
        options = (list(needs_gradient), 3.0, 1, "l2", reduction, normalization, 0.5)
        torch.library.opcheck(velocity_loss_op, (*inputs, random_mask("soft", (2, 2, 5)), torch.rand(2), *options))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_opcheck_localization(dtype: torch.dtype, normalization: str) -> None:
    outputs = [random_tensors(shape, [dtype])[0] for shape in [(2, 6, 5)] * 3 + [(2, 3, 4, 4)]]
    masks = [random_mask("soft", (2, 6))] * 3 + [random_mask("bool", (1, 2, 2)).view(torch.uint8)]
    arguments = (outputs, masks, [True, False, True, True], "l1", normalization, 0.5)
    torch.library.opcheck(localization_loss_op, arguments)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_opcheck_low_rank_localization(normalization: str) -> None:
    outputs = low_rank_outputs(3, (2, 6), 9, 5, BRAIN, weight_dtype=SINGLE)
    tensors: list[Tensor | None] = [x for output in outputs for x in output]
    tensors[5] = None
    masks = [random_mask("soft", (2, 6))] * 2 + [random_mask("bool", (1, 6))]
    torch.library.opcheck(low_rank_localization_loss_op, (tensors, masks, normalization, 0.5))
    _, _, matrices, inverse = low_rank_localization_loss_op(tensors, masks, normalization, 0.5)
    needs_gradient = [x is not None and i != 1 for i, x in enumerate(tensors)]
    upstream = torch.tensor(2.0)
    arguments = (tensors, masks, needs_gradient, upstream, matrices, inverse[0] if inverse else None)
    torch.library.opcheck(low_rank_localization_loss_backward_op, (*arguments, normalization, 0.5))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("per_element", [True, False])
def test_opcheck_scale_gradients(dtype: torch.dtype, per_element: bool) -> None:
    gradients = random_tensors((2, 3, 4), [dtype] * 2)
    upstream = torch.rand(2, 3, 4) if per_element else torch.tensor(3.0)
    for inverse, weight in itertools.product((None, torch.tensor(0.5)), (None, torch.rand(2), torch.rand(1) > 0)):
        torch.library.opcheck(scale_gradients_op, (gradients, upstream, 0.25, inverse, weight))


@pytest.mark.parametrize("lse", [None, torch.zeros(2, 3, 7)])
def test_opcheck_concept_attention(lse: Tensor | None) -> None:
    query, key = (random_tensors((2, 3, n, 16), [SINGLE])[0] for n in (7, 9))
    arguments = (query, key, torch.tensor([[0, 3], [8, -1]]), 0.25, random_mask("bool", (2, 9)), lse)
    torch.library.opcheck(concept_attention_op, arguments)


def check_compiled(loss: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    """Compiled without graph breaks, the loss and its gradients are the same bits in the same layout."""
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, value = loss(*tensors), compiled(*tensors)
    assert torch.equal(value, expected)
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    if not leaves:
        assert not value.requires_grad
        return
    upstream = torch.rand_like(expected)
    gradients = [torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (expected, value, value)]
    for eager, first, second in zip(*gradients, strict=True):
        assert eager.dtype == first.dtype and eager.stride() == first.stride()
        assert torch.equal(eager, first) and torch.equal(first, second)


def requiring(tensors: Sequence[Tensor], needs_gradient: Sequence[bool]) -> list[Tensor]:
    return [x.requires_grad_(needed) for x, needed in zip(tensors, needs_gradient, strict=True)]


@pytest.mark.parametrize("dtypes", [(HALF,) * 3, (SINGLE,) * 3, (SINGLE, BRAIN, HALF)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalization", ["all", "mask"])
def test_compiled_velocity(dtypes: tuple[torch.dtype, ...], reduction: str, normalization: str) -> None:
    mask, sample_weight = random_mask("soft", (2, 2, 5)), torch.rand(2)

    def loss(*inputs: Tensor) -> Tensor:
        options = {"reduction": reduction, "mask_normalization": normalization, "guidance_scale": 3.0, "weight": 0.5}
        return negatively_guided_velocity_loss(*inputs, mask=mask, sample_weight=sample_weight, **options).loss

    for needs_gradient in COMPILED_NEEDS_GRADIENT:
        check_compiled(loss, *requiring(random_tensors((2, 3, 4, 5), dtypes), needs_gradient))


@pytest.mark.parametrize("dtypes", [(HALF,) * 4, (SINGLE, BRAIN, HALF, HALF)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compiled_localization(dtypes: tuple[torch.dtype, ...], normalization: str) -> None:
    """Several layers: alike, of another dtype, transposed, and of another shape with a mask of its own."""
    masks = {str(i): random_mask("soft", (2, 6)) for i in range(3)} | {"3": random_mask("bool", (1, 2, 2))}

    def loss(*outputs: Tensor) -> Tensor:
        layers = {str(i): x for i, x in enumerate(outputs)}
        return localization_loss(layers, masks, loss_type="l1", normalization=normalization, weight=0.5).loss

    patterns = [(True,) * 4, (True, False, False, False), (False, True, True, True), (False,) * 4]
    if normalization == "mean":  # to the kernels it is "sum" with another scale
        patterns = patterns[:1]
    for needs_gradient in patterns:
        shapes = [(2, 6, 5), (2, 5, 6), (2, 6, 5), (2, 3, 4, 4)]
        outputs = [random_tensors(shape, [dtype])[0] for shape, dtype in zip(shapes, dtypes, strict=True)]
        outputs[1] = outputs[1].transpose(1, 2)
        check_compiled(loss, *requiring(outputs, needs_gradient))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_compiled_low_rank_localization(normalization: str) -> None:
    mask = random_mask("soft", (2, 6))

    def loss(*tensors: Tensor | None) -> Tensor:
        layers = [LowRankOutput(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        return localization_loss(layers, mask, normalization=normalization, weight=0.5).loss

    # All gradients, and those of two of hidden states, weight and bias.
    for frozen in (None, 0, 1, 2) if normalization != "mean" else (None,):
        outputs = low_rank_outputs(3, (2, 6), 9, 5, BRAIN, weight_dtype=SINGLE)
        tensors: list[Tensor | None] = [
            x.requires_grad_(i % 3 != frozen) for i, x in enumerate(x for output in outputs for x in output)
        ]
        tensors[5] = None
        check_compiled(loss, *tensors)


def test_compiled_with_one_tensor_in_several_places() -> None:
    mask = random_mask("soft", (2, 6))
    x, hidden, weight = (torch.randn(shape, requires_grad=True) for shape in ((2, 6, 5), (2, 6, 5), (9, 5)))
    check_compiled(lambda x: velocity_loss(x, x, reduction="none").loss, x)
    check_compiled(lambda x: localization_loss([x, x, 2 * x], mask).loss, x)
    check_compiled(lambda h, w: localization_loss([LowRankOutput(h, w, None)] * 2, mask).loss, hidden, weight)
