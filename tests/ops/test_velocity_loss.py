"""`velocity_loss`, `negatively_guided_velocity_loss` and `negatively_guided_velocity` against the float64 oracle."""

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

from fastunlearn.dtypes import compute_dtype
from fastunlearn.functional import (
    VelocityLoss,
    negatively_guided_velocity,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.ops.torch_backend import blocks
from fastunlearn.testing import DTYPES, cases, check_velocity_loss, compare, oracle, poisoned_memory, random_mask
from fastunlearn.testing.cases import Case
from fastunlearn.testing.checks import velocity_loss_of

SHAPE = (2, 3, 3, 5, 7)
NAMES = ("prediction", "uncond", "cond")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def velocities(
    shape: tuple[int, ...] = SHAPE, dtypes: Any = torch.float32, count: int = 3, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = [dtypes] * count if isinstance(dtypes, torch.dtype) else dtypes
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]


def call(inputs: list[Tensor], **options: Any) -> VelocityLoss:
    return velocity_loss_of(inputs, **options)


@pytest.fixture(params=[2, 3], ids=["target", "guided"])
def count(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=["l2", "l1"])
def loss_type(request: pytest.FixtureRequest) -> str:
    return request.param


OPS = ("negatively_guided_velocity", "negatively_guided_velocity_loss", "velocity_loss")


@pytest.mark.parametrize("case", cases(OPS), ids=lambda case: f"{case.op}-{case.dtype}-{case.name}")
def test_grid(case: Case) -> None:
    case.run(torch.device("cpu"), None)


@pytest.mark.parametrize("normalization", ["all", "mask"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_mask_gives_zero(normalization: str, reduction: str, count: int) -> None:
    inputs = velocities(count=count)
    loss = call(inputs, mask=torch.zeros(1, 3, 5, 7), mask_normalization=normalization, reduction=reduction).loss
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), inputs))


@pytest.mark.parametrize("normalization", ["all", "mask"])
def test_sample_weight_is_not_part_of_the_normalization(normalization: str, count: int) -> None:
    weights = torch.tensor([0.0, 3.0])
    mask = random_mask("soft", (2, 3, 5, 7))
    check_velocity_loss(velocities(count=count), sample_weight=weights, mask_normalization=normalization)
    check_velocity_loss(velocities(count=count), sample_weight=weights, mask=mask, mask_normalization=normalization)


def test_mask_with_a_channel_dim_of_one() -> None:
    inputs, mask = velocities(), random_mask("soft", (2, 3, 5, 7))
    with_channel = call(inputs, mask=mask.unsqueeze(1)).loss
    assert torch.equal(with_channel, call(inputs, mask=mask).loss)


def test_channel_dim_two() -> None:
    mask = random_mask("soft", (2, 2, 3, 4))
    shape = (2, 4, 3, 6, 8)
    check_velocity_loss(velocities(shape), mask=mask, channel_dim=2)
    loss = call(velocities(shape), mask=mask[:, :, None], channel_dim=2).loss
    assert torch.equal(loss, call(velocities(shape), mask=mask, channel_dim=2).loss)


@pytest.mark.parametrize("name", ["mask", "sample_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("normalization", ["all", "mask"])
def test_a_weight_that_is_not_finite_is_not_hidden(name: str, value: float, normalization: str, count: int) -> None:
    """A loss that is finite in spite of it would be wrong in silence."""
    weights = {"mask": torch.ones(2, 3, 5, 7), "sample_weight": torch.ones(2)}[name]
    weights.view(-1)[1] = value
    loss = call(velocities(count=count), **{name: weights}, mask_normalization=normalization).loss
    assert not loss.isfinite()


def test_mask_takes_no_gradient() -> None:
    mask = torch.rand(2, 3, 5, 7, requires_grad=True)
    weights = torch.rand(2, requires_grad=True)
    call(velocities(), mask=mask, sample_weight=weights, mask_normalization="mask").loss.backward()
    assert mask.grad is None
    assert weights.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_zero_hides_nan(reduction: str, bad: float, count: int, loss_type: str) -> None:
    mask = random_mask("bool", (2, 3, 5, 7))
    clean, dirty = velocities(count=count), velocities(count=count)
    hidden = ~mask[:, None].expand(SHAPE)
    with torch.no_grad():
        for x in dirty:
            x[hidden] = bad
    options: dict[str, Any] = {"mask": mask, "reduction": reduction, "loss_type": loss_type}
    losses, gradients = [], []
    for inputs in (clean, dirty):
        losses.append(call(inputs, **options).loss)
        gradients.append(torch.autograd.grad(losses[-1].sum(), inputs))
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sample_weight_zero_hides_nan(count: int) -> None:
    inputs = velocities(count=count)
    with torch.no_grad():
        inputs[0][0] = torch.nan
    loss = call(inputs, sample_weight=torch.tensor([0, 2])).loss
    gradients = torch.autograd.grad(loss, inputs, torch.tensor(torch.inf))
    assert loss.isfinite()
    assert not any(g[0].any() for g in gradients)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (1, 3, 7), (3, 1, 13, 17), (5,), (2, 3, 2, 3, 2, 3)])
def test_odd_shapes(shape: tuple[int, ...], count: int, loss_type: str) -> None:
    check_velocity_loss(velocities(shape, count=count), loss_type=loss_type)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("normalization", ["all", "mask"])
def test_empty_batch_gives_zero(shape: tuple[int, ...], normalization: str, count: int) -> None:
    inputs = velocities(shape, count=count)
    result = call(inputs, mask=torch.ones(1, *shape[2:]), mask_normalization=normalization)
    gradients = torch.autograd.grad(result.loss, inputs)
    assert result.loss == result.prediction_norm == result.target_norm == 0
    assert all(g.shape == shape for g in gradients)
    assert call(inputs, reduction="none").loss.shape == shape


def test_strided_inputs(count: int) -> None:
    permuted = [x.detach().permute(4, 1, 3, 2, 0).requires_grad_() for x in velocities(count=count)]
    check_velocity_loss(permuted, mask=random_mask("soft", (7, 5, 3, 2)))
    sliced = [x.detach()[..., ::2].requires_grad_() for x in velocities(count=count)]
    check_velocity_loss(sliced, reduction="none")
    expanded = [x.detach()[:1].expand(4, *SHAPE[1:]).requires_grad_() for x in velocities(count=count)]
    check_velocity_loss(expanded)


def test_strided_upstream_gradients(count: int, loss_type: str) -> None:
    mask = random_mask("soft", (1, 3, 5, 7))
    options: dict[str, Any] = {"reduction": "none", "loss_type": loss_type, "mask": mask}
    check_velocity_loss(velocities(count=count), upstream=torch.tensor(2.0).expand(SHAPE), **options)
    check_velocity_loss(velocities(count=count), upstream=torch.randn(SHAPE[::-1]).permute(4, 3, 2, 1, 0), **options)
    check_velocity_loss(velocities(count=count), upstream=torch.tensor(1024.0), loss_type=loss_type)


def test_no_gradient_at_a_tie() -> None:
    prediction, _ = velocities(count=2)
    loss = velocity_loss(prediction, prediction.detach().clone(), loss_type="l1").loss
    assert loss == 0
    assert not torch.autograd.grad(loss, prediction)[0].any()


@pytest.mark.torch_backend
def test_blocks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 11)
    check_velocity_loss(velocities(count=count), mask=random_mask("soft", (2, 3, 5, 7)), mask_normalization="mask")
    check_velocity_loss(velocities(count=count), reduction="none")


@pytest.mark.torch_backend
def test_half_precision_is_upcast_in_blocks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 200)
    inputs = velocities((4, 10, 10, 10), torch.bfloat16, count)
    with LargestTensor(torch.float32) as largest:
        call(inputs, mask=random_mask("bool", (1, 5, 5))).loss.backward()
    assert 0 < largest.elements <= 200


def test_two_backwards_through_a_kept_graph(count: int) -> None:
    inputs = velocities(count=count)
    loss = call(inputs).loss
    first = torch.autograd.grad(loss, inputs, torch.tensor(1.0), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.tensor(2.0), retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_gradients_only_of_the_tensors_that_require_one() -> None:
    for name in NAMES:
        tensors = dict(zip(NAMES, (x.detach() for x in velocities()), strict=True))
        tensors[name].requires_grad_()
        negatively_guided_velocity_loss(**tensors).loss.backward()
        assert [other for other, x in tensors.items() if x.grad is not None] == [name]
    assert not call([x.detach() for x in velocities()]).loss.requires_grad


@pytest.mark.parametrize("with_inputs", [False, True])
def test_second_derivative_raises(with_inputs: bool, count: int) -> None:
    inputs = velocities(count=count)
    (gradient,) = torch.autograd.grad(call(inputs).loss, inputs[:1], create_graph=True)
    penalty = gradient.square().sum() + (inputs[0].sum() if with_inputs else 0)
    with pytest.raises(RuntimeError, match="once-differentiable"):
        penalty.backward()


def test_autocast_changes_nothing() -> None:
    plain = call(velocities()).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(velocities()).loss, plain)


def test_compiled_without_graph_breaks(count: int, loss_type: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    mask = random_mask("soft", (1, 1, 5, 1))
    for options in ({}, {"mask": mask, "mask_normalization": "mask", "weight": 0.5}, {"reduction": "none"}):
        inputs, others = velocities(count=count), velocities(count=count)
        loss = compiled(inputs, loss_type=loss_type, **options).loss
        expected = call(others, loss_type=loss_type, **options).loss
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss.sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), others))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=3, max_size=5).map(tuple),
    mask_sizes=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    kind=st.sampled_from(["soft", "half", "bool", "int", "ones"]),
    one_mask=st.booleans(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    layouts=st.lists(st.sampled_from(["contiguous", "reversed", "sliced"]), min_size=3, max_size=3),
    options=st.fixed_dictionaries(
        {
            "loss_type": st.sampled_from(["l2", "l1"]),
            "mask_normalization": st.sampled_from(["all", "mask"]),
        }
    ),
    seed=st.integers(0, 1000),
)
def test_any_shapes_dtypes_and_layouts(
    shape: tuple[int, ...],
    mask_sizes: list[int],
    kind: str,
    one_mask: bool,
    dtypes: list[torch.dtype],
    layouts: list[str],
    options: dict[str, Any],
    seed: int,
) -> None:
    coarse = map(math.gcd, shape[2:], mask_sizes)
    mask = random_mask(kind, (1 if one_mask else shape[0], *coarse), seed)
    inputs = []
    for x, layout in zip(velocities(shape, dtypes, seed=seed), layouts, strict=True):
        x = x.detach()
        if layout == "reversed":
            x = x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
        elif layout == "sliced":
            x = torch.stack([x, x], dim=-1)[..., 0]
        inputs.append(x.requires_grad_())
    check_velocity_loss(inputs, mask=mask, **options)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
def test_negatively_guided_velocity(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    uncond, cond = velocities(dtypes=dtypes, count=2)
    velocity = negatively_guided_velocity(uncond, cond, 3.0)
    compute, u, c = compute_dtype(uncond, cond), oracle.to_numpy(uncond), oracle.to_numpy(cond)
    result_dtype = torch.promote_types(*dtypes)
    expected = (uncond.to(compute) + 3 * (uncond.to(compute) - cond.to(compute))).to(result_dtype)
    compare("velocity", velocity, expected, u + 3 * (u - c), compute=compute)
    upstream = torch.randn(SHAPE).to(result_dtype)
    for gradient, x, factor in zip(
        torch.autograd.grad(velocity, [uncond, cond], upstream), (u, c), (4, -3), strict=True
    ):
        other = (factor * upstream.to(compute)).to(gradient.dtype)
        assert x.shape == tuple(gradient.shape)
        compare("gradient", gradient, other, factor * oracle.to_numpy(upstream), compute=compute)


def test_negatively_guided_velocity_gradcheck_and_second_derivative() -> None:
    uncond, cond = velocities((2, 3), torch.float64, 2)
    assert torch.autograd.gradcheck(negatively_guided_velocity, (uncond, cond))
    upstream = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    velocity = negatively_guided_velocity(uncond, cond)
    (gradient,) = torch.autograd.grad(velocity, uncond, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once-differentiable"):
        gradient.sum().backward()
    compiled = torch.compile(negatively_guided_velocity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(uncond, cond), velocity)
