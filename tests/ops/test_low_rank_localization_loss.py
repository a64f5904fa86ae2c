"""`localization_loss` of low-rank outputs equals the dense loss, without computing the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

from fastunlearn import LowRankOutput, MaskLocalizationLoss, localization_loss
from fastunlearn.dtypes import MASK
from fastunlearn.ops.torch_backend import blocks
from fastunlearn.testing import (
    DTYPES,
    cases,
    check_low_rank_localization_loss,
    low_rank_outputs,
    poisoned_memory,
    random_mask,
)
from fastunlearn.testing.cases import Case

GRID = (3, 2, 5)
TOKENS = (2, 30)
D, R = 12, 5


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(params=["sum", "background_mean"])
def normalization(request: pytest.FixtureRequest) -> str:
    return request.param


def random_outputs(layers: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> list[LowRankOutput]:
    sizes = {"tokens": TOKENS, "features": D, "rank": R, **options}
    outputs = low_rank_outputs(layers, dtype=dtype, **sizes)
    for x in leaves(outputs):
        x.requires_grad_()
    return outputs


def leaves(outputs: list[LowRankOutput]) -> list[Tensor]:
    return [x for output in outputs for x in output if x is not None]


def dense(output: LowRankOutput) -> Tensor:
    return torch.nn.functional.linear(*output)


@pytest.mark.parametrize("case", cases(["low_rank_localization_loss"]), ids=lambda case: f"{case.dtype}-{case.name}")
def test_grid(case: Case) -> None:
    case.run(torch.device("cpu"), None)


@pytest.mark.parametrize("normalization", ["sum", "mean", "background_mean"])
def test_mixed_with_dense_outputs_in_any_order(normalization: str) -> None:
    low_rank, mask = random_outputs(3), random_mask("soft", (2, *GRID))
    mixed = {"a": low_rank[0], "b": dense(low_rank[1]), "c": low_rank[2]}
    result = localization_loss(mixed, mask, normalization=normalization, weight=0.3)
    expected = localization_loss([dense(x) for x in low_rank], mask, normalization=normalization, weight=0.3)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(x.loss, leaves(low_rank)) for x in (result, expected)]
    torch.testing.assert_close(*gradients)


def test_one_mask_per_layer_and_the_module() -> None:
    outputs = dict(zip("ab", random_outputs(), strict=True))
    masks = {"a": random_mask("soft", (2, *GRID)), "b": random_mask("bool", (1, 30))}
    loss, entries = MaskLocalizationLoss()(outputs, masks)
    expected, expected_entries = MaskLocalizationLoss()({name: dense(x) for name, x in outputs.items()}, masks)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(entries, expected_entries)


def test_mixed_dtypes() -> None:
    outputs = [random_outputs(1, dtype, weight_dtype=torch.float32)[0] for dtype in DTYPES]
    check_low_rank_localization_loss(outputs[:3], random_mask("soft", (2, *GRID)))
    check_low_rank_localization_loss(outputs, random_mask("soft", (2, *GRID)))


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_masks_of_any_dtype(loss_type: str, normalization: str) -> None:
    low_rank, hard = random_outputs(2), random_mask("bool", (2, *GRID))
    outputs = [low_rank[0], dense(low_rank[1])]
    expected = localization_loss(outputs, hard, loss_type=loss_type, normalization=normalization)
    for dtype in MASK:
        result = localization_loss(outputs, hard.to(dtype), loss_type=loss_type, normalization=normalization)
        torch.testing.assert_close(result, expected, check_dtype=False)


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
@pytest.mark.parametrize("which", ["dense output", "hidden", "bias", "mask"])
def test_float64_anywhere_is_float64_everywhere(which: str, loss_type: str, normalization: str) -> None:
    (low_rank,), tokens, mask = random_outputs(1), torch.randn(2, 30, 7), random_mask("soft", (2, *GRID))
    options: Any = {"loss_type": loss_type, "normalization": normalization}
    whole = LowRankOutput(*(x.detach().double() for x in low_rank))
    expected = localization_loss([whole, tokens.double()], mask.double(), **options)
    if which in ("hidden", "bias"):
        low_rank = low_rank._replace(**{which: getattr(whole, which)})
    result = localization_loss(
        [low_rank, tokens.double() if which == "dense output" else tokens],
        mask.double() if which == "mask" else mask,
        **options,
    )
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)


def test_mean_is_the_sum_over_the_number_of_elements() -> None:
    outputs, mask = random_outputs(), random_mask("soft", (2, *GRID))
    result = localization_loss(outputs, mask, normalization="mean", weight=0.5 * 30 * D)
    expected = localization_loss(outputs, mask, weight=0.5)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(30 * D * result.per_layer, expected.per_layer)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, leaves(outputs)) for x in (result, expected)))


def test_rank_zero_leaves_the_bias(normalization: str) -> None:
    mask, (output,) = random_mask("soft", (2, *GRID)), random_outputs(1, rank=0)
    result = localization_loss([output], mask, normalization=normalization)
    expected = localization_loss([output.bias.expand(2, 30, D)], mask, normalization=normalization)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, output.bias) for x in (result, expected)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_weight_zero_hides_nan(bad: float, loss_type: str, normalization: str) -> None:
    mask = random_mask("bool", (2, *GRID))
    clean, dirty = random_outputs(1), random_outputs(1)
    with torch.no_grad():
        clean[0].hidden[mask.flatten(1)] = 0
        dirty[0].hidden[mask.flatten(1)] = bad
    results = [
        localization_loss(x, mask, loss_type=loss_type, normalization=normalization).loss for x in (clean, dirty)
    ]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(loss, leaves(x)) for loss, x in zip(results, (clean, dirty), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0].any()


@pytest.mark.parametrize("normalization", ["sum", "mean", "background_mean"])
@pytest.mark.parametrize("batch", [2, 0])
def test_no_background_and_an_empty_batch_give_zero(batch: int, normalization: str) -> None:
    outputs = random_outputs(1, tokens=(batch, 30))
    loss = localization_loss(outputs, torch.ones(1, *GRID), normalization=normalization).loss
    assert loss == 0
    gradients = torch.autograd.grad(loss, leaves(outputs))
    assert [x.shape for x in gradients] == [(batch, 30, R), (D, R), (D,)]
    assert not any(x.any() for x in gradients)


def test_never_negative_if_everything_cancels() -> None:
    hidden = torch.ones(*TOKENS, R) * 0.1
    weight = torch.randn(D, R, generator=torch.Generator().manual_seed(0))
    loss = localization_loss([LowRankOutput(hidden, weight, -(weight * 0.1).sum(1))], torch.zeros(1, *GRID)).loss
    largest = 30 * 4 * (weight * 0.1).sum(1).square().sum()
    assert 0 <= loss <= 8 * torch.finfo(torch.float32).eps * largest


def test_gradients_only_of_the_tensors_that_require_one() -> None:
    mask = random_mask("soft", (2, *GRID))
    for index in range(3):
        (output,) = random_outputs(1)
        for i, x in enumerate(output):
            x.requires_grad_(i == index)
        (gradient,) = torch.autograd.grad(localization_loss([output], mask).loss, [output[index]])
        (other,) = random_outputs(1)
        expected = torch.autograd.grad(localization_loss([dense(other)], mask).loss, [other[index]])[0]
        torch.testing.assert_close(gradient, expected)


@pytest.mark.torch_backend
def test_no_output_is_computed() -> None:
    outputs = random_outputs(2, features=400, rank=3)
    with LargestTensor(torch.float32) as largest:
        localization_loss(outputs, random_mask("soft", (1, *GRID))).loss.backward()
    assert 0 < largest.elements <= 400 * 4


@pytest.mark.torch_backend
def test_blocks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 17)
    check_low_rank_localization_loss(random_outputs(), random_mask("soft", (1, *GRID)))


def test_two_backwards_through_a_kept_graph() -> None:
    outputs = random_outputs()
    loss = localization_loss(outputs, random_mask("soft", (2, *GRID))).loss
    first = torch.autograd.grad(loss, leaves(outputs), torch.tensor(1.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves(outputs), torch.tensor(2.0), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_second_derivative_raises() -> None:
    outputs = random_outputs()
    loss = localization_loss(outputs, random_mask("soft", (2, *GRID))).loss
    (gradient,) = torch.autograd.grad(loss, outputs[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once-differentiable"):
        gradient.square().sum().backward()


def test_autocast_changes_nothing() -> None:
    mask = random_mask("soft", (2, *GRID))
    for loss_type in ("l2", "l1"):
        outputs, others = random_outputs(), random_outputs()
        with torch.autocast("cpu", torch.bfloat16):
            loss = localization_loss(outputs, mask, loss_type=loss_type).loss
        loss.backward()
        expected = localization_loss(others, mask, loss_type=loss_type).loss
        expected.backward()
        assert torch.equal(loss, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves(outputs), leaves(others), strict=True))


def test_compiled_without_graph_breaks(normalization: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(localization_loss, fullgraph=True, backend="aot_eager")
    mask = random_mask("soft", (2, *GRID))
    outputs, others = random_outputs(), random_outputs()
    result = compiled(dict(zip("ab", outputs, strict=True)), mask, normalization=normalization)
    expected = localization_loss(others, mask, normalization=normalization)
    torch.testing.assert_close(result, expected)
    gradients = torch.autograd.grad(result.loss, leaves(outputs))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.loss, leaves(others)))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 70)),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mask_kind=st.sampled_from(["soft", "half", "bool", "int", "zeros"]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([None, torch.float32]),
    output_kind=st.sampled_from(["random", "fresh", "biased"]),
    with_bias=st.booleans(),
)
def test_any_output(
    tokens: tuple[int, int],
    sizes: tuple[int, int],
    mask_kind: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    output_kind: str,
    with_bias: bool,
) -> None:
    outputs = random_outputs(
        1, dtype, tokens=tokens, features=max(sizes), rank=min(sizes), weight_dtype=weight_dtype, kind=output_kind
    )
    if not with_bias:
        outputs = [LowRankOutput(*output[:2], None) for output in outputs]
    check_low_rank_localization_loss(outputs, random_mask(mask_kind, tokens))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(2, 30)}, r"eraser_outputs\[0\]\.hidden: expected shape \(B, N, r\), got \(2, 30\)"),
        ({"hidden": None}, r"eraser_outputs\[0\]\.hidden: expected a tensor, got NoneType"),
        ({"weight": torch.zeros(R, D)}, r"eraser_outputs\[0\]\.weight: expected shape \(D, 5\) .* got \(5, 12\)"),
        ({"weight": torch.zeros(D, R, dtype=torch.int32)}, r"eraser_outputs\[0\]\.weight: expected one of the dtypes"),
        ({"bias": torch.zeros(R)}, r"eraser_outputs\[0\]\.bias: expected shape \(12,\)"),
        ({"bias": torch.zeros(D, device="meta")}, r"eraser_outputs\[0\]\.bias: expected a tensor on cpu"),
    ],
)
def test_bad_input_raises_a_clear_error(change: dict[str, Any], match: str) -> None:
    (output,) = random_outputs(1)
    with pytest.raises((TypeError, ValueError), match=match):
        localization_loss([output._replace(**change)], random_mask("soft", (2, *GRID)))


def test_a_mask_of_another_size_raises() -> None:
    with pytest.raises(ValueError, match="30 positions"):
        localization_loss(random_outputs(1), torch.zeros(2, 31))
