"""One call of an operation, checked: its results and gradients against the oracle, and that inputs stay unchanged.

The error may be at most what `fastunlearn.testing.compare` allows: twice that of `fastunlearn.ops.definition`, which is
eager torch computing in float32, plus what rounding may add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn import functional
from fastunlearn.dtypes import compute_dtype
from fastunlearn.ops import definition
from fastunlearn.testing import oracle
from fastunlearn.testing.error_bound import Comparison, compare


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside this context newly allocated memory is filled with NaN, so that elements left unwritten show up."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def velocity_loss_of(inputs: Sequence[Tensor], module: ModuleType = functional, **options: Any) -> Any:
    """The velocity loss that fits the inputs, and the two norms.

    Args:
        inputs: two for `velocity_loss`, three for `negatively_guided_velocity_loss`.
        module: where these functions are: `fastunlearn.functional` or `fastunlearn.ops.definition`.
        options: keyword arguments of the function.
    """
    name = "velocity_loss" if len(inputs) == 2 else "negatively_guided_velocity_loss"
    return getattr(module, name)(*inputs, **options)


def check_velocity_loss(
    inputs: Sequence[Tensor], *, upstream: Tensor | None = None, backend: Any = None, **options: Any
) -> list[Comparison]:
    """Check the loss, the norms and the gradients of all inputs that require one, and that no input changes.

    Args:
        inputs: prediction and target, or prediction, uncond and cond.
        upstream: the gradient of the loss; ones if None.
        backend: the backend under test.
        options: keyword arguments of `fastunlearn.velocity_loss`. The mask has no channel dim.

    Raises:
        AssertionError: an error is larger than the bound of `compare`, or an input has changed.
    """
    if len(inputs) == 3:
        options.setdefault("guidance_scale", 3.0)
    before = [x.detach().clone() for x in inputs]
    wanted = [x for x in inputs if x.requires_grad]
    with poisoned_memory():
        result = velocity_loss_of(inputs, backend=backend, **options)
        if upstream is None:
            upstream = torch.ones_like(result.loss)
        gradients = iter(torch.autograd.grad(result.loss, wanted, upstream))

    compute = compute_dtype(*inputs, options.get("mask"), options.get("sample_weight"))
    exact = oracle.velocity_loss(*inputs, **options, upstream=upstream)
    expected, *expected_norms = velocity_loss_of(inputs, definition, **options)
    expected_gradients = iter(torch.autograd.grad(expected, wanted, upstream))
    elements = inputs[0].numel()
    # A mask's sum is the one sum of many terms in a gradient.
    terms = 1 if options.get("reduction") == "none" else elements
    comparisons = [compare("loss", result.loss, expected, exact["loss"], terms=terms, compute=compute)]
    for name, x in zip(("prediction", "uncond", "cond"), inputs, strict=False):
        if x.requires_grad:
            gradient, other = next(gradients), next(expected_gradients)
            what = f"gradient of {name}"
            comparisons.append(compare(what, gradient, other, exact[name], terms=terms, roundings=2, compute=compute))
    for name, other in zip(("prediction_norm", "target_norm"), expected_norms, strict=True):
        norm = getattr(result, name)
        if norm.requires_grad:
            raise AssertionError(f"{name}: expected a detached tensor, got one that requires a gradient")
        comparisons.append(compare(name, norm, other, exact[name], terms=elements, compute=compute))
    _check_unchanged(inputs, before)
    return comparisons


def check_localization_loss(
    outputs: Sequence[Tensor], mask: Tensor, *, upstream: float = 1.0, backend: Any = None, **options: Any
) -> list[Comparison]:
    """Check the loss, the layers' terms and all gradients, with one mask for all layers, and that no input changes.

    Args:
        outputs: tokens (B, N, D) or feature maps (B, C, *spatial), all requiring gradients.
        mask: (B or 1, *spatial).
        upstream: the gradient of the loss.
        backend: the backend under test.
        options: keyword arguments of `fastunlearn.localization_loss`.

    Raises:
        AssertionError: an error is larger than the bound of `compare`, or an input has changed.
    """
    before = [x.detach().clone() for x in outputs]
    with poisoned_memory():
        result = functional.localization_loss(outputs, mask, backend=backend, **options)
        gradients = torch.autograd.grad(result.loss, outputs, torch.full_like(result.loss, upstream))

    masks = [mask.flatten(1) if x.dim() == 3 else mask for x in outputs]
    compute = compute_dtype(*outputs, mask)
    exact = oracle.localization_loss(list(outputs), masks, **options, upstream=upstream)
    expected, expected_terms = definition.localization_loss(outputs, masks, **options)
    expected_gradients = torch.autograd.grad(expected, outputs, torch.full_like(expected, upstream))
    terms = max(x.numel() for x in outputs)
    comparisons = [compare("loss", result.loss, expected, exact["loss"], terms=terms, compute=compute)]
    for gradient in zip(gradients, expected_gradients, exact["gradients"], strict=True):
        comparisons.append(compare("gradient", *gradient, terms=terms, roundings=2, compute=compute))
    for i, output in enumerate(outputs):
        pair = result.per_layer[i], expected_terms[i]
        comparisons.append(compare("term", *pair, exact["per_layer"][i], terms=output.numel(), compute=compute))
    _check_detached(result.per_layer)
    _check_unchanged(outputs, before)
    return comparisons


def check_low_rank_localization_loss(
    outputs: Sequence[functional.LowRankOutput],
    mask: Tensor,
    *,
    upstream: float = 1.0,
    backend: Any = None,
    **options: Any,
) -> list[Comparison]:
    """Check the loss, the layers' terms and all gradients, with one mask for all layers, and that no input changes.

    Where a sum cancels, the low-rank form loses more than the dense form of the definition. The bound therefore adds a
    few units in the last place of what the sum would be if nothing cancelled.

    Args:
        outputs: the layers; all their tensors require gradients.
        mask: (B or 1, *grid).
        upstream: the gradient of the loss.
        backend: the backend under test.
        options: keyword arguments of `fastunlearn.localization_loss`.

    Raises:
        AssertionError: an error is larger than the bound of `compare`, or an input has changed.
    """
    inputs = [x for output in outputs for x in output if x is not None]
    before = [x.detach().clone() for x in inputs]
    with poisoned_memory():
        result = functional.localization_loss(outputs, mask, backend=backend, **options)
        gradients = iter(torch.autograd.grad(result.loss, inputs, torch.full_like(result.loss, upstream)))

    masks = [mask.flatten(1)] * len(outputs)
    compute = compute_dtype(*inputs, mask)
    exact = oracle.low_rank_localization_loss(list(outputs), masks, **options, upstream=upstream)
    expected, expected_terms = definition.low_rank_localization_loss(outputs, masks, **options)
    expected_gradients = iter(torch.autograd.grad(expected, inputs, torch.full_like(expected, upstream)))
    # Sums over tokens, over features and over pairs of the rank.
    terms = max(output.hidden.numel() * output.weight.numel() for output in outputs)
    term_magnitudes = [magnitude for magnitude, *_ in exact["magnitudes"]]
    check = functools.partial(compare, terms=terms, compute=compute)
    loss_magnitude = options.get("weight", 1.0) * float(np.mean(term_magnitudes))
    comparisons = [check("loss", result.loss, expected, exact["loss"], magnitude=loss_magnitude)]
    if result.loss < 0:
        raise AssertionError(f"loss: expected no negative number, got {result.loss}")
    for i, output in enumerate(outputs):
        _, *magnitudes = exact["magnitudes"][i]
        names = ("hidden", "weight", "bias")
        for name, x, exact_gradient, magnitude in zip(names, output, exact["gradients"][i], magnitudes, strict=True):
            if x is not None:
                pair = next(gradients), next(expected_gradients)
                what = f"gradient of {name}"
                comparisons.append(check(what, *pair, exact_gradient, roundings=2, magnitude=magnitude))
        pair = result.per_layer[i], expected_terms[i]
        comparisons.append(check("term", *pair, exact["per_layer"][i], magnitude=term_magnitudes[i]))
    _check_detached(result.per_layer)
    _check_unchanged(inputs, before)
    return comparisons


def check_concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor,
    *,
    key_mask: Tensor | None = None,
    with_lse: bool = False,
    backend: Any = None,
) -> list[Comparison]:
    """Check the probabilities.

    Args:
        query: as in `fastunlearn.concept_attention`.
        key: as in `fastunlearn.concept_attention`.
        token_indices: as in `fastunlearn.concept_attention`.
        key_mask: as in `fastunlearn.concept_attention`.
        with_lse: whether to pass the log-sum-exp too, in the dtype of the arithmetic.
        backend: the backend under test.

    Raises:
        AssertionError: an error is larger than the bound of `compare`.
    """
    compute = compute_dtype(query, key)
    exact = oracle.concept_attention(query, key, token_indices, key_mask=key_mask)
    lse = definition.log_sum_exp(query, key, key_mask).to(compute)
    # A rounding error of one unit in a logit or a log-sum-exp of size x is an error of x units in the probability.
    magnitude = float(np.abs(exact).max() * (1 + lse.abs().max() / 4))
    options = {"key_mask": key_mask, "lse": lse if with_lse else None, "backend": backend}
    actual = functional.concept_attention(query, key, token_indices, **options)
    expected = definition.concept_attention(query, key, token_indices, key_mask=key_mask)
    return [compare("probability", actual, expected, exact, terms=key.shape[2], magnitude=magnitude, compute=compute)]


def check_negatively_guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float = 3.0) -> list[Comparison]:
    """Check the velocity and both gradients, for an upstream gradient of ones."""
    velocity = functional.negatively_guided_velocity(uncond, cond, guidance_scale)
    gradients = torch.autograd.grad(velocity, (uncond, cond), torch.ones_like(velocity))
    compute = compute_dtype(uncond, cond)
    exact_uncond, exact_cond = oracle.to_numpy(uncond), oracle.to_numpy(cond)
    exact = exact_uncond + guidance_scale * (exact_uncond - exact_cond)
    expected = definition.negatively_guided_velocity(uncond, cond, guidance_scale).detach()
    comparisons = [compare("velocity", velocity, expected, exact, compute=compute)]
    factors = (1 + guidance_scale, -guidance_scale)
    for name, gradient, factor in zip(("uncond", "cond"), gradients, factors, strict=True):
        expected_gradient, exact_gradient = torch.full_like(gradient, factor), np.full(gradient.shape, factor)
        comparisons.append(compare(f"gradient of {name}", gradient, expected_gradient, exact_gradient, compute=compute))
    return comparisons


def check_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Run `torch.autograd.gradcheck` on `function`, and check that a second derivative raises.

    Args:
        function: takes the tensors `inputs` and returns a loss.
        inputs: float64 tensors that require gradients.

    Raises:
        AssertionError: a gradient is wrong, or a second derivative does not raise.
    """
    torch.autograd.gradcheck(function, tuple(inputs))
    (gradient, *_) = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    try:
        (gradient.square().sum() + sum(x.sum() for x in inputs)).backward()
    except RuntimeError as error:
        if "once-differentiable" in str(error):
            return
        raise
    raise AssertionError("a second derivative: expected a RuntimeError, got a gradient")


def _check_detached(per_layer: Tensor) -> None:
    if per_layer.requires_grad:
        raise AssertionError("per_layer: expected a detached tensor, got one that requires a gradient")


def _check_unchanged(inputs: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for x, old in zip(inputs, before, strict=True):
        if not torch.equal(x.detach().nan_to_num(), old.nan_to_num()):
            raise AssertionError("an input was changed")
