"""An operation, its gradients and its manners, checked against the float64 oracle and eager torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn import functional
from fastunlearn.ops import definition
from fastunlearn.testing import oracle
from fastunlearn.testing.error_bound import Comparison, compare


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside this context fresh memory is NaN: what an operation forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def velocity_loss_of(inputs: Sequence[Tensor], **options: Any) -> functional.VelocityLoss:
    """`velocity_loss` of two inputs, `negatively_guided_velocity_loss` of three."""
    if len(inputs) == 2:
        return functional.velocity_loss(*inputs, **options)
    return functional.negatively_guided_velocity_loss(*inputs, **options)


def check_velocity_loss(
    inputs: Sequence[Tensor], *, upstream: Tensor | None = None, backend: Any = None, **options: Any
) -> list[Comparison]:
    """Loss, norms and the gradients of all inputs that require them; inputs must stay as they were.

    Args:
        inputs: prediction and target, or prediction, uncond and cond.
        upstream: the gradient of the loss; ones if None.
        backend: what runs the operation.
        options: of `fastunlearn.velocity_loss`; a mask without a channel dim.

    Raises:
        AssertionError: something is off by more than the bound of `compare`.
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

    compute = definition.compute_dtype(*inputs, options.get("mask"), options.get("sample_weight"))
    exact = oracle.velocity_loss(*inputs, **options, upstream=upstream)
    expected = definition.velocity_loss(*inputs, **options)
    expected_gradients = iter(torch.autograd.grad(expected, wanted, upstream))
    per_element = options.get("reduction") == "none"
    # A mask's sum is the one sum of many terms in a gradient.
    terms = 1 if per_element else inputs[0].numel()
    found = [compare("loss", result.loss, expected, exact["loss"], terms=terms, compute=compute)]
    for name, x in zip(("prediction", "uncond", "cond"), inputs, strict=False):
        if x.requires_grad:
            gradient, other = next(gradients), next(expected_gradients)
            what = f"gradient of {name}"
            found.append(compare(what, gradient, other, exact[name], terms=terms, roundings=2, compute=compute))
    target = inputs[1].to(compute)
    if len(inputs) == 3:
        target = target + options["guidance_scale"] * (target - inputs[2].to(compute))
    others = {"prediction_norm": inputs[0].to(compute).norm(), "target_norm": target.norm()}
    for name, other in others.items():
        norm = getattr(result, name)
        if norm.requires_grad:
            raise AssertionError(f"{name} must be detached")
        found.append(compare(name, norm, other.detach(), exact[name], terms=inputs[0].numel(), compute=compute))
    _check_unchanged(inputs, before)
    return found


def check_localization_loss(
    outputs: Sequence[Tensor], mask: Tensor, *, upstream: float = 1.0, backend: Any = None, **options: Any
) -> list[Comparison]:
    """Loss, terms and the gradients of all layers, with one mask for all; inputs must stay as they were.

    Args:
        outputs: tokens (B, N, D) or feature maps (B, C, *spatial), all requiring gradients.
        mask: (B or 1, *spatial).
        upstream: the gradient of the loss.
        backend: what runs the operation.
        options: of `fastunlearn.localization_loss`.

    Raises:
        AssertionError: something is off by more than the bound of `compare`.
    """
    before = [x.detach().clone() for x in outputs]
    with poisoned_memory():
        result = functional.localization_loss(outputs, mask, backend=backend, **options)
        gradients = torch.autograd.grad(result.loss, outputs, torch.full_like(result.loss, upstream))

    masks = [mask.flatten(1) if x.dim() == 3 else mask for x in outputs]
    compute = definition.compute_dtype(*outputs, mask)
    exact = oracle.localization_loss(list(outputs), masks, **options, upstream=upstream)
    expected = definition.localization_loss(list(outputs), masks, **options)
    expected_gradients = torch.autograd.grad(expected, outputs, torch.full_like(expected, upstream))
    terms = max(x.numel() for x in outputs)
    found = [compare("loss", result.loss, expected, exact["loss"], terms=terms, compute=compute)]
    for gradient in zip(gradients, expected_gradients, exact["gradients"], strict=True):
        found.append(compare("gradient", *gradient, terms=terms, roundings=2, compute=compute))
    options.pop("weight", None)
    for i, (output, of_layer) in enumerate(zip(outputs, masks, strict=True)):
        term = definition.localization_loss([output.detach().to(compute)], [of_layer], **options)
        found.append(
            compare("term", result.per_layer[i], term, exact["per_layer"][i], terms=output.numel(), compute=compute)
        )
    if result.per_layer.requires_grad:
        raise AssertionError("per_layer must be detached")
    _check_unchanged(outputs, before)
    return found


def check_low_rank_localization_loss(
    outputs: Sequence[functional.LowRankOutput],
    mask: Tensor,
    *,
    upstream: float = 1.0,
    backend: Any = None,
    **options: Any,
) -> list[Comparison]:
    """Loss, terms and the gradients of all tensors of all layers, with one mask for all; inputs must stay as they were.

    Beyond what the dense form in eager torch loses, a few units of what the numbers add up to where nothing cancels.

    Args:
        outputs: all tensors requiring gradients.
        mask: (B or 1, *grid).
        upstream: the gradient of the loss.
        backend: what runs the operation.
        options: of `fastunlearn.localization_loss`.

    Raises:
        AssertionError: something is off by more than the bound of `compare`.
    """
    inputs = [x for output in outputs for x in output if x is not None]
    before = [x.detach().clone() for x in inputs]
    with poisoned_memory():
        result = functional.localization_loss(outputs, mask, backend=backend, **options)
        gradients = iter(torch.autograd.grad(result.loss, inputs, torch.full_like(result.loss, upstream)))

    masks = [mask.flatten(1)] * len(outputs)
    compute = definition.compute_dtype(*inputs, mask)
    exact = oracle.low_rank_localization_loss(list(outputs), masks, **options, upstream=upstream)
    expected = definition.low_rank_localization_loss(list(outputs), masks, **options)
    expected_gradients = iter(torch.autograd.grad(expected, inputs, torch.full_like(expected, upstream)))
    # Sums over tokens, over features and over pairs of the rank.
    terms = max(output.hidden.numel() * output.weight.numel() for output in outputs)
    magnitude = options.get("weight", 1.0) * float(np.mean([of_term for of_term, *_ in exact["magnitudes"]]))
    found = [compare("loss", result.loss, expected, exact["loss"], terms=terms, magnitude=magnitude, compute=compute)]
    if result.loss < 0:
        raise AssertionError(f"the loss must not be negative, got {result.loss}")
    for i, output in enumerate(outputs):
        names = ("hidden", "weight", "bias")
        of_term, *magnitudes = exact["magnitudes"][i]
        for name, x, of_x, magnitude in zip(names, output, exact["gradients"][i], magnitudes, strict=True):
            if x is not None:
                pair, what = (next(gradients), next(expected_gradients)), f"gradient of {name}"
                found.append(compare(what, *pair, of_x, terms=terms, roundings=2, magnitude=magnitude, compute=compute))
        rest = {name: value for name, value in options.items() if name != "weight"}
        of_layer = output._replace(hidden=output.hidden.to(compute))
        term = definition.low_rank_localization_loss([of_layer], masks[:1], **rest).detach()
        found.append(
            compare(
                "term",
                result.per_layer[i],
                term,
                exact["per_layer"][i],
                terms=terms,
                magnitude=of_term,
                compute=compute,
            )
        )
    if result.per_layer.requires_grad:
        raise AssertionError("per_layer must be detached")
    _check_unchanged(inputs, before)
    return found


def check_concept_attention(
    query: Tensor,
    key: Tensor,
    token_indices: Tensor,
    *,
    key_mask: Tensor | None = None,
    with_lse: bool = False,
    backend: Any = None,
) -> list[Comparison]:
    """The probabilities.

    Args:
        query: as in `fastunlearn.concept_attention`, like what follows.
        key: likewise.
        token_indices: likewise.
        key_mask: likewise.
        with_lse: whether the log-sum-exp is given, in the dtype of the arithmetic.
        backend: what runs the operation.

    Raises:
        AssertionError: something is off by more than the bound of `compare`.
    """
    compute = definition.compute_dtype(query, key)
    exact = oracle.concept_attention(query, key, token_indices, key_mask=key_mask)
    lse = definition.log_sum_exp(query, key, key_mask).to(compute)
    # A logit or its log-sum-exp of size x is off by x units where the probability is off by one.
    magnitude = float(np.abs(exact).max() * (1 + lse.abs().max() / 4))
    options = {"key_mask": key_mask, "lse": lse if with_lse else None, "backend": backend}
    actual = functional.concept_attention(query, key, token_indices, **options)
    expected = definition.concept_attention(query, key, token_indices, key_mask)
    return [compare("probability", actual, expected, exact, terms=key.shape[2], magnitude=magnitude, compute=compute)]


def check_negatively_guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float = 3.0) -> list[Comparison]:
    """The velocity and both gradients, at a unit upstream gradient."""
    velocity = functional.negatively_guided_velocity(uncond, cond, guidance_scale)
    gradients = torch.autograd.grad(velocity, (uncond, cond), torch.ones_like(velocity))
    compute = definition.compute_dtype(uncond, cond)
    u, c = (x.detach().to(compute) for x in (uncond, cond))
    exact_u, exact_c = oracle.to_numpy(uncond), oracle.to_numpy(cond)
    expected = (u + guidance_scale * (u - c)).to(velocity.dtype)
    exact = exact_u + guidance_scale * (exact_u - exact_c)
    found = [compare("velocity", velocity, expected, exact, compute=compute)]
    for name, gradient, factor in zip(
        ("uncond", "cond"), gradients, (1 + guidance_scale, -guidance_scale), strict=True
    ):
        other = torch.full_like(gradient, factor)
        exact_gradient = np.full(gradient.shape, factor)
        found.append(compare(f"gradient of {name}", gradient, other, exact_gradient, compute=compute))
    return found


def check_gradients(function: Any, inputs: Sequence[Tensor]) -> None:
    """`torch.autograd.gradcheck` of `function` in float64, and that a second derivative raises.

    Args:
        function: of the tensors `inputs`, returning a loss.
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
    raise AssertionError("a second derivative must raise RuntimeError")


def _check_unchanged(inputs: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for x, old in zip(inputs, before, strict=True):
        if not torch.equal(x.detach().nan_to_num(), old.nan_to_num()):
            raise AssertionError("an input was changed")
