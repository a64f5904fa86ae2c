"""The error that a result may have: a multiple of eager torch's own error, never a flat tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastunlearn.testing.oracle import to_numpy


class Comparison(NamedTuple):
    """The largest absolute errors of a result and of eager torch's result, and the largest error allowed."""

    what: str
    error: float
    eager_error: float
    bound: float


def compare(
    what: str,
    actual: Tensor,
    eager: Tensor,
    exact: Any,
    *,
    terms: int = 1,
    roundings: int = 1,
    magnitude: float | None = None,
    compute: torch.dtype,
) -> Comparison:
    """Check that the error of `actual` is at most twice that of `eager`, plus what rounding may add.

    Args:
        what: the name of the result in messages.
        actual: the result under test.
        eager: eager torch's result, computed in `compute` and rounded to the dtype of `actual`.
        exact: the float64 oracle's result.
        terms: how many numbers of one sign add up to an element. Summed in another order than eager's, they may lose
            half a unit in the last place at each level of a pairwise sum, and the factors of each of them a few units.
        roundings: how often a result is rounded to its dtype. A gradient is rounded twice: when the forward pass writes
            it, and when it is multiplied by the upstream gradient. With few elements, eager's one rounding may happen
            to be exact.
        magnitude: the size of the numbers that cancel in the sum; the size of the result if None.
        compute: the dtype of the arithmetic.

    Raises:
        AssertionError: dtype or shape differ, the error is larger than the bound, or the bound would accept zeros.
    """
    # Not `assert`, which Python's -O removes.
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{what}: expected dtype {eager.dtype}, got {actual.dtype}")
    if not tuple(actual.shape) == tuple(eager.shape) == np.shape(exact):
        raise AssertionError(f"{what}: expected shape {np.shape(exact)}, got {tuple(actual.shape)}")
    exact = np.asarray(exact)
    if exact.size == 0:
        return Comparison(what, 0.0, 0.0, 0.0)
    largest = np.abs(exact).max()
    levels = 4 + np.log2(max(terms, 1)) / 2
    allowance = levels * torch.finfo(compute).eps * (largest if magnitude is None else magnitude)
    allowance += roundings * torch.finfo(actual.dtype).eps / 2 * largest
    allowance += torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    eager_error = np.abs(to_numpy(eager) - exact).max()
    bound = 2 * eager_error + allowance
    # A bound that accepts zeros checks nothing, except for results so small that they round to 0.
    if largest > torch.finfo(actual.dtype).smallest_normal and not bound < largest / 2:
        raise AssertionError(f"{what}: the bound {bound} would accept zeros: the exact result is {largest}")
    error = np.abs(to_numpy(actual) - exact).max()
    if not error <= bound:
        raise AssertionError(f"{what}: expected an error of at most {bound}, got {error}")
    return Comparison(what, float(error), float(eager_error), float(bound))
