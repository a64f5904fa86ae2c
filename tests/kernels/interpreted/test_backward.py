"""The backward passes of the kernels: upstream gradients, kept graphs, saved tensors, second derivatives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastunlearn.functional import localization_loss, velocity_loss
from fastunlearn.ops import definition
from fastunlearn.testing import compare, oracle, random_mask, random_tensors
from fastunlearn.testing.interpreter import observed_kernels

SHAPE = (2, 3, 8, 10, 13)


def prediction_and_target(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    prediction, target = random_tensors(SHAPE, [dtype, dtype])
    return prediction.requires_grad_(), target


def velocity(x: Tensor) -> Tensor:
    return velocity_loss(x, prediction_and_target(x.dtype)[1] + 1).loss


def localization(x: Tensor) -> Tensor:
    return localization_loss([x.reshape(2, 195, 16)], random_mask("bool", (2, 195))).loss


losses = pytest.mark.parametrize("loss", [velocity, localization])


@losses
@pytest.mark.parametrize("upstream", [2.0, 0.25, 65536.0, 0.0])
@pytest.mark.parametrize("keep", [False, True])
def test_upstream_gradients_multiply_exactly(loss: Callable[[Tensor], Tensor], upstream: float, keep: bool) -> None:
    x, _ = prediction_and_target()
    (unit,) = torch.autograd.grad(loss(x), x)
    (scaled,) = torch.autograd.grad(loss(x), x, torch.tensor(upstream), retain_graph=keep)
    assert unit.any()
    assert torch.equal(scaled, upstream * unit)


@losses
def test_every_backward_pass_of_a_kept_graph_scales_the_same_gradient(loss: Callable[[Tensor], Tensor]) -> None:
    x, _ = prediction_and_target()
    value = loss(x)
    gradients = [
        torch.autograd.grad(value, x, torch.tensor(u), retain_graph=keep)[0]
        for u, keep in ((4.0, True), (1.0, True), (0.5, True), (2.0, False))
    ]
    assert torch.equal(gradients[0], 4 * gradients[1])
    assert torch.equal(gradients[2], 0.5 * gradients[1])
    assert torch.equal(gradients[3], 2 * gradients[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


@losses
def test_gradients_accumulate_over_backward_passes(loss: Callable[[Tensor], Tensor]) -> None:
    x, _ = prediction_and_target()
    (unit,) = torch.autograd.grad(loss(x), x)
    for _ in range(2):
        (loss(x) / 2).backward()
    assert torch.equal(x.grad, unit)


@losses
def test_the_same_bits_every_time(loss: Callable[[Tensor], Tensor]) -> None:
    x, _ = prediction_and_target()
    values, gradients = [], []
    for _ in range(2):
        values.append(loss(x))
        gradients.append(torch.autograd.grad(values[-1], x)[0])
    assert torch.equal(*values)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("elements", [10**4, 10**6])
def test_float16_gradients_under_a_scaler(elements: int) -> None:
    """With GradScaler's initial scale. Unscaled, 2 * error / n would underflow; scaled, it must not overflow."""
    prediction, target = random_tensors((1, elements), [torch.float16] * 2)
    prediction.requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(velocity_loss(prediction, target).loss).backward()
    upstream = torch.tensor(65536.0)
    (expected,) = torch.autograd.grad(definition.velocity_loss(prediction, target)[0], prediction, upstream)
    exact = oracle.velocity_loss(prediction, target, upstream=upstream)["prediction"]
    compare("gradient", prediction.grad, expected, exact, compute=torch.float32)
    assert prediction.grad.isfinite().all()
    assert (prediction.grad == 0).float().mean() < 0.01


def test_a_unit_upstream_gradient_moves_nothing_and_any_other_costs_one_read_and_one_write() -> None:
    for upstream, passes in ((1.0, 0), (3.0, 1)):
        x, target = prediction_and_target()
        loss = velocity_loss(x, target).loss
        with observed_kernels() as observed:
            torch.autograd.grad(loss, x, torch.tensor(upstream))
        kernel = "scale_gradients_kernel"
        assert observed.launches == [kernel]
        # In place, results and gradients are the same memory, counted under either name.
        moved = [counter[kernel, "result_ptrs"] + counter[kernel, "gradient_ptrs"] for counter in
                 (observed.loaded, observed.stored)]  # fmt: skip
        assert moved == [passes * 4 * x.numel()] * 2
    loss = velocity_loss(x, target).loss
    with observed_kernels() as observed:
        torch.autograd.grad(loss, x, retain_graph=True)
    assert observed.loaded[kernel, "gradient_ptrs"] == observed.stored[kernel, "result_ptrs"] == 4 * x.numel()


@losses
def test_saved_tensor_hooks_may_replace_saved_gradients(loss: Callable[[Tensor], Tensor]) -> None:
    x, _ = prediction_and_target()
    (expected,) = torch.autograd.grad(loss(x), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        value = loss(x)
    assert torch.equal(torch.autograd.grad(value, x, torch.tensor(2.0))[0], 2 * expected)


@losses
def test_second_derivatives_raise_even_if_the_input_has_another_gradient(loss: Callable[[Tensor], Tensor]) -> None:
    x, _ = prediction_and_target()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once-differentiable"):
        torch.autograd.grad(gradient.square().sum() + x.sum(), x)


def test_inputs_are_not_kept_alive() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    doubled = x * 2
    alive = weakref.ref(doubled)
    loss = velocity_loss(doubled, torch.zeros(SHAPE)).loss
    del doubled
    gc.collect()
    assert alive() is None
    loss.backward()
    torch.testing.assert_close(x.grad, 8 * x.detach() / x.numel())
