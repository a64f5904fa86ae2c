"""`localization_loss` against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

from fastunlearn.functional import LowRankOutput, localization_loss
from fastunlearn.ops.torch_backend import blocks
from fastunlearn.testing import DTYPES, cases, check_localization_loss, oracle, poisoned_memory, random_mask
from fastunlearn.testing.cases import Case

GRID = (3, 2, 5)
TOKENS = (2, 30, 7)
FEATURES = (2, 4, 3, 5, 6)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def random_outputs(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture(params=["sum", "mean", "background_mean"])
def normalization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["l2", "l1"])
def loss_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("case", cases(["localization_loss"]), ids=lambda case: f"{case.dtype}-{case.name}")
def test_grid(case: Case) -> None:
    case.run(torch.device("cpu"), None)


def test_mean_is_the_sum_over_the_number_of_elements(loss_type: str) -> None:
    mask = random_mask("soft", (2, *GRID))
    outputs = random_outputs([TOKENS, (2, 7, *GRID)])
    result = localization_loss(outputs, mask, normalization="mean", loss_type=loss_type, weight=0.5 * 30 * 7)
    expected = localization_loss(outputs, mask, loss_type=loss_type, weight=0.5)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(30 * 7 * result.per_layer, expected.per_layer)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, outputs) for x in (result, expected)))


def test_one_mask_for_the_batch_and_flat_masks(normalization: str) -> None:
    check_localization_loss(random_outputs([TOKENS]), random_mask("soft", (1, *GRID)), normalization=normalization)
    check_localization_loss(random_outputs([TOKENS]), random_mask("soft", (2, 30)), normalization=normalization)


def test_mixed_dtypes() -> None:
    outputs = [random_outputs([TOKENS], dtype, seed)[0] for seed, dtype in enumerate(DTYPES)]
    check_localization_loss(outputs[:3], random_mask("soft", (2, *GRID)))
    check_localization_loss(outputs, random_mask("soft", (2, *GRID)))


def test_masks_and_outputs_by_name() -> None:
    first, second = random_outputs([TOKENS, FEATURES])
    masks = {"b": random_mask("soft", (2, 1, 3, 5, 6)), "a": random_mask("soft", (2, *GRID)), "unused": torch.ones(1)}
    result = localization_loss({"a": first, "b": second}, masks)
    exact = oracle.localization_loss([first, second], [masks["a"].flatten(1), masks["b"][:, 0]])
    np.testing.assert_allclose(oracle.to_numpy(result.per_layer), exact["per_layer"], rtol=1e-6)
    np.testing.assert_allclose(result.loss.item(), exact["loss"], rtol=1e-6)


def test_no_layers_give_zero() -> None:
    for empty in ([], {}):
        result = localization_loss(empty, torch.ones(1, 4))
        assert result.loss == 0
        assert result.per_layer.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_zero_hides_nan(bad: float, loss_type: str, normalization: str) -> None:
    mask = random_mask("bool", (2, 30))
    clean, dirty = random_outputs([TOKENS]), random_outputs([TOKENS])
    with torch.no_grad():
        dirty[0][mask] = bad
    results = [
        localization_loss(x, mask, loss_type=loss_type, normalization=normalization).loss for x in (clean, dirty)
    ]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(results, (clean, dirty), strict=True)]
    assert torch.equal(*gradients)


def test_no_background_gives_zero(normalization: str) -> None:
    outputs = random_outputs([TOKENS])
    loss = localization_loss(outputs, torch.ones(2, *GRID), normalization=normalization).loss
    assert loss == 0
    assert not torch.autograd.grad(loss, outputs)[0].any()


def test_all_background(loss_type: str, normalization: str) -> None:
    check_localization_loss(
        random_outputs([TOKENS]), torch.zeros(1, *GRID), loss_type=loss_type, normalization=normalization
    )


def test_empty_batch_gives_zero(normalization: str) -> None:
    outputs = random_outputs([(0, 30, 7)])
    loss = localization_loss(outputs, torch.zeros(1, *GRID), normalization=normalization).loss
    assert loss == 0
    assert torch.autograd.grad(loss, outputs)[0].shape == (0, 30, 7)


def test_fresh_eraser_has_no_l1_gradient() -> None:
    output = torch.zeros(TOKENS, requires_grad=True)
    loss = localization_loss([output], torch.zeros(1, *GRID), loss_type="l1").loss
    assert not torch.autograd.grad(loss, output)[0].any()


def test_strided_outputs_and_scaled_upstream(loss_type: str) -> None:
    (permuted,) = random_outputs([(7, 2, 30)])
    permuted = permuted.detach().permute(1, 2, 0).requires_grad_()
    sliced = random_outputs([(2, 60, 7)])[0].detach()[:, ::2].requires_grad_()
    check_localization_loss(
        [permuted, sliced], random_mask("soft", (2, *GRID)).mT.contiguous().mT, upstream=1024.0, loss_type=loss_type
    )


@pytest.mark.torch_backend
def test_blocks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, loss_type: str) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 17)
    check_localization_loss(random_outputs([TOKENS, (2, 30, 40)]), random_mask("soft", (1, *GRID)), loss_type=loss_type)


@pytest.mark.torch_backend
def test_half_precision_is_upcast_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 200)
    outputs = random_outputs([(2, 30, 40), (2, 30, 300)], torch.bfloat16)
    with LargestTensor(torch.float32) as largest:
        localization_loss(outputs, random_mask("soft", (1, *GRID))).loss.backward()
    assert 0 < largest.elements <= 200


def test_two_backwards_through_a_kept_graph() -> None:
    outputs = random_outputs([TOKENS, TOKENS])
    loss = localization_loss(outputs, random_mask("soft", (2, *GRID))).loss
    first = torch.autograd.grad(loss, outputs, torch.tensor(1.0), retain_graph=True)
    second = torch.autograd.grad(loss, outputs, torch.tensor(2.0), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("with_inputs", [False, True])
def test_second_derivative_raises(with_inputs: bool) -> None:
    outputs = random_outputs([TOKENS])
    loss = localization_loss(outputs, random_mask("soft", (2, *GRID))).loss
    (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
    penalty = gradient.square().sum() + (outputs[0].sum() if with_inputs else 0)
    with pytest.raises(RuntimeError, match="once-differentiable"):
        penalty.backward()


def test_compiled_without_graph_breaks(loss_type: str, normalization: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(localization_loss, fullgraph=True, backend="aot_eager")
    mask = random_mask("soft", (2, *GRID))
    options: dict[str, Any] = {"loss_type": loss_type, "normalization": normalization}
    outputs, others = random_outputs([TOKENS, TOKENS]), random_outputs([TOKENS, TOKENS])
    result = compiled(dict(zip("ab", outputs, strict=True)), mask, **options)
    expected = localization_loss(others, mask, **options)
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result.loss, outputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.loss, others))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=4, max_size=5).map(tuple),
    mask_sizes=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    kind=st.sampled_from(["soft", "half", "bool", "int", "zeros"]),
    one_mask=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    is_channels_last=st.booleans(),
    normalization=st.sampled_from(["sum", "mean", "background_mean"]),
    loss_type=st.sampled_from(["l2", "l1"]),
)
def test_any_feature_map(
    shape: tuple[int, ...],
    mask_sizes: list[int],
    kind: str,
    one_mask: bool,
    dtype: torch.dtype,
    is_channels_last: bool,
    normalization: str,
    loss_type: str,
) -> None:
    mask = random_mask(kind, (1 if one_mask else shape[0], *mask_sizes[: len(shape) - 2]))
    outputs = random_outputs([shape, shape], dtype)
    if is_channels_last:
        outputs = [x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_() for x in outputs]
    check_localization_loss(outputs, mask, normalization=normalization, loss_type=loss_type)


@pytest.mark.parametrize("normalization", ["sum", "background_mean"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_mask_that_is_not_finite_is_not_hidden(low_rank: bool, normalization: Any) -> None:
    """A loss that is finite in spite of it would be wrong in silence."""
    output = LowRankOutput(torch.randn(2, 6, 2), torch.randn(5, 2), None) if low_rank else torch.randn(2, 6, 5)
    mask = torch.zeros(2, 6)
    mask[1, 2] = math.nan
    assert localization_loss([output], mask, normalization=normalization).loss.isnan()
