"""The error that a result may have: a multiple of eager torch's own, never a flat tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastunlearn.testing.oracle import to_numpy


class Comparison(NamedTuple):
    """The largest errors of a result and of eager torch's, in absolute terms, and what is allowed."""

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
    """The error of `actual`, checked: at most twice that of `eager` plus what rounding may add.

    Args:
        what: what the result is called.
        actual: the result under test.
        eager: eager torch's result, computed in `compute` and rounded to the dtype of `actual`.
        exact: the float64 oracle's.
        terms: how many numbers of one sign are added up to make an element. A sum in another order than eager's may
            lose another half unit at every level of a pairwise sum, and its factors a few units.
        roundings: how often a result is rounded to its dtype: a gradient twice, as it is written by the forward pass,
            and as it is multiplied by the upstream gradient. On few elements eager's one rounding may be a lucky one.
        magnitude: of what cancels in the sum; that of the result if None.
        compute: the dtype of the arithmetic.

    Raises:
        AssertionError: another dtype or shape, an error over the bound, or a bound that zeros would pass.
    """
    # Not `assert`: Python's -O would take the checks away.
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{what} has dtype {actual.dtype}, not {eager.dtype}")
    if not tuple(actual.shape) == tuple(eager.shape) == np.shape(exact):
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}, not {np.shape(exact)}")
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
    # A bound that lets zeros pass checks nothing. (Results too small for their dtype are zeros.)
    if largest > torch.finfo(actual.dtype).smallest_normal and not bound < largest / 2:
        raise AssertionError(f"{what}: the bound {bound} would accept zeros: the exact result is {largest}")
    error = np.abs(to_numpy(actual) - exact).max()
    if not error <= bound:
        raise AssertionError(f"{what}: error {error} is over the bound {bound}")
    return Comparison(what, float(error), float(eager_error), float(bound))
