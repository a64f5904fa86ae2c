"""The error that a result may have: a multiple of eager torch's own, never a flat tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastunlearn.testing.oracle import to_numpy


def assert_close_to_exact(actual: Tensor, eager: Tensor, exact: Any, *, terms: int = 1, compute: torch.dtype) -> None:
    """The largest error of `actual` is at most twice that of `eager` plus what rounding may add.

    Args:
        actual: the result under test.
        eager: eager torch's result, computed in `compute` and rounded to the dtype of `actual`.
        exact: the float64 oracle's.
        terms: how many numbers of one sign are added up to make an element. A sum in another order than eager's may
            lose another half unit at every level of a pairwise sum, and its factors a few units.
        compute: the dtype of the arithmetic.
    """
    assert actual.dtype == eager.dtype, (actual.dtype, eager.dtype)
    assert tuple(actual.shape) == tuple(eager.shape) == np.shape(exact), (actual.shape, eager.shape, np.shape(exact))
    exact = np.asarray(exact)
    if exact.size == 0:
        return
    largest = np.abs(exact).max()
    levels = 4 + np.log2(max(terms, 1)) / 2
    allowance = (levels * torch.finfo(compute).eps + torch.finfo(actual.dtype).eps / 2) * largest
    allowance += torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    bound = 2 * np.abs(to_numpy(eager) - exact).max() + allowance
    # A bound that lets zeros pass checks nothing. (Results too small for their dtype are zeros.)
    if largest > torch.finfo(actual.dtype).smallest_normal:
        assert bound < largest / 2, f"the bound {bound} would accept zeros: the exact result is {largest}"
    error = np.abs(to_numpy(actual) - exact).max()
    assert error <= bound, f"error {error} is over the bound {bound}"
