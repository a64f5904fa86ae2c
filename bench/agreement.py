"""Compares results before anything is timed: peers that disagree do not do the same work."""

from __future__ import annotations

from torch import Tensor


class Disagreement(RuntimeError):
    """Peers compute different results, so their times must not be compared."""


def check_relative_difference(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Compares two tensors by the norm of their difference.

    Args:
        what: what is compared, for the message.
        actual: one peer's result.
        expected: the other peer's result.
        tolerance: the largest norm of the difference allowed, relative to the norm of `expected`.

    Returns:
        The relative difference.

    Raises:
        Disagreement: it exceeds the tolerance.
    """
    difference = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= tolerance:
        raise Disagreement(f"{what}: expected a relative difference of at most {tolerance:.0e}, got {difference:.1e}")
    return difference


def check_largest_difference(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares two tensors element by element.

    Args:
        what: what is compared, for the message.
        actual: one peer's result.
        expected: the exact result.
        tolerance: the largest difference allowed, relative to the largest element of `expected`.

    Raises:
        Disagreement: an element differs by more.
    """
    allowed = tolerance * expected.abs().max().item()
    difference = (actual.double() - expected.double()).abs().max().item()
    if not difference <= allowed:
        raise Disagreement(f"{what}: expected a difference of at most {allowed:.3g}, got {difference:.3g}")
