from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunlearn.training.evaluation.metrics import (
    MaskSummary,
    Ratio,
    Sums,
    distance,
    drift,
    erasure,
    localization,
    mask_share,
    summarize_masks,
)

SHAPE = (3, 2, 4, 6, 8)  # (B, F, C, H, W)


def velocities(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def total(sums: Sums, root: bool = False) -> float | None:
    ratio = Ratio(root)
    ratio.add(torch.zeros(()), sums)
    return ratio.total


@pytest.mark.parametrize("coefficient", [1.0, 0.0, -0.5, 0.3])
def test_the_erasure_coefficient_is_the_projection_on_the_concepts_direction(coefficient: float) -> None:
    v_uncond, v_cond, other = velocities(3)
    direction = v_cond - v_uncond
    # A component orthogonal to the concept's direction, in every sample, does not count.
    orthogonal = other - direction * erasure(v_uncond + other, v_uncond, v_cond).numerator.div(
        direction.flatten(1).square().sum(1)
    ).reshape(-1, 1, 1, 1, 1)
    velocity = v_uncond + coefficient * direction + orthogonal
    assert total(erasure(velocity, v_uncond, v_cond)) == pytest.approx(coefficient, abs=1e-12)


def test_samples_are_weighted_by_how_much_there_is_to_erase() -> None:
    v_uncond = torch.zeros(2, 1, 1)
    v_cond = torch.tensor([1.0, 3.0]).reshape(2, 1, 1)
    velocity = torch.tensor([1.0, 0.0]).reshape(2, 1, 1)  # nothing erased at the first, everything at the second
    assert total(erasure(velocity, v_uncond, v_cond)) == pytest.approx(1 / 10)  # not 1 / 2


def test_the_distance_to_the_baseline_counts_every_change() -> None:
    v_uncond, v_cond, other = velocities(3)
    for coefficient in (1.0, 0.0, -0.5):
        velocity = v_uncond + coefficient * (v_cond - v_uncond)
        assert total(distance(velocity, v_uncond, v_cond), root=True) == pytest.approx(abs(coefficient), abs=1e-12)
    expected = (other.square().sum() / (v_cond - v_uncond).square().sum()).sqrt()
    assert total(distance(v_uncond + other, v_uncond, v_cond), root=True) == pytest.approx(expected.item(), rel=1e-12)


def test_drift_is_the_relative_change() -> None:
    (v_cond,) = velocities(1)
    assert total(drift(v_cond, v_cond), root=True) == 0
    assert total(drift(1.25 * v_cond, v_cond), root=True) == pytest.approx(0.25)
    assert total(drift(torch.zeros_like(v_cond), v_cond), root=True) == pytest.approx(1)


@pytest.mark.parametrize("channel_dim", [1, 2])
def test_localization_is_the_share_of_the_change_inside_the_mask(channel_dim: int) -> None:
    v_cond, velocity = (v.movedim(2, channel_dim) for v in velocities(2))
    mask = torch.rand(3, 2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.6  # on the token grid, patch 2
    at_latents = F.interpolate(mask.double(), scale_factor=(2, 2), mode="nearest").unsqueeze(channel_dim)
    change = (velocity - v_cond).square()
    expected = (change * at_latents).sum() / change.sum()
    assert total(localization(velocity, v_cond, mask, channel_dim)) == pytest.approx(expected.item(), rel=1e-12)
    inside = v_cond + (velocity - v_cond) * at_latents
    assert total(localization(inside, v_cond, mask, channel_dim)) == pytest.approx(1)
    outside = v_cond + (velocity - v_cond) * (1 - at_latents)
    assert total(localization(outside, v_cond, mask, channel_dim)) == 0
    assert total(localization(v_cond, v_cond, mask, channel_dim)) is None  # nothing has changed


def test_soft_masks_count_in_proportion() -> None:
    v_cond, velocity = velocities(2)
    mask = torch.full((1, 1, 1, 1), 0.25)
    assert total(localization(velocity, v_cond, mask, 2)) == pytest.approx(0.25)
    assert mask_share(torch.tensor([[[0.5, 0.0]], [[1.0, 1.0]]])).tolist() == [0.25, 1.0]


def test_half_precision_is_summed_in_float32() -> None:
    exact = velocities(3)
    for dtype in (torch.bfloat16, torch.float16):
        velocity, v_uncond, v_cond = (v.to(dtype) for v in exact)
        got, wanted = (
            erasure(velocity, v_uncond, v_cond),
            erasure(velocity.double(), v_uncond.double(), v_cond.double()),
        )
        assert got.numerator.dtype == torch.float32
        torch.testing.assert_close(got.numerator.double(), wanted.numerator, rtol=1e-5, atol=1e-4)
    large = torch.full((1, 70_000), 300.0, dtype=torch.float16)  # its square's sum is beyond float16
    assert total(drift(torch.zeros_like(large), large), root=True) == pytest.approx(1)


def test_a_ratio_is_divided_in_total_and_per_timestep() -> None:
    ratio = Ratio()
    ratio.add(torch.tensor([900, 100]), Sums(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 8.0])))
    ratio.add(torch.tensor([100.0]), Sums(torch.tensor([6.0]), torch.tensor([8.0])))
    ratio.add(torch.tensor(500.5), Sums(torch.zeros(2), torch.zeros(2)))
    assert ratio.timesteps == [900, 500.5, 100]
    assert [ratio.between(t, t) for t in ratio.timesteps] == [0.5, None, 0.5]
    assert [ratio.points_between(t, t) for t in ratio.timesteps] == [1, 2, 2]
    assert ratio.between(900, 300) == pytest.approx(1 / 2)
    assert ratio.between(99, 0) is None and ratio.points_between(99, 0) == 0
    assert ratio.total == pytest.approx(9 / 18)
    assert ratio.points == 5
    assert Ratio().total is None
    root = Ratio(root=True)
    root.add(torch.tensor(1), Sums(torch.tensor([4.0]), torch.tensor([16.0])))
    assert root.total == root.between(1, 1) == 0.5


def test_the_batch_size_does_not_change_a_ratio() -> None:
    velocity, v_uncond, v_cond = velocities(3)
    t = torch.tensor([3.0, 3.0, 1.0])
    whole, split = Ratio(), Ratio()
    whole.add(t, erasure(velocity, v_uncond, v_cond))
    for index in range(3):
        row = slice(index, index + 1)
        split.add(t[row], erasure(velocity[row], v_uncond[row], v_cond[row]))
    assert whole.total == pytest.approx(split.total, rel=1e-14)
    assert whole.between(3, 3) == pytest.approx(split.between(3, 3), rel=1e-14)


def test_velocities_that_are_not_finite_are_refused() -> None:
    velocity, v_cond = velocities(2)
    velocity[1, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="finite ones, got nan .* at t=7"):
        Ratio().add(torch.tensor([5, 7, 9]), drift(velocity, v_cond))


def test_the_summary_of_masks() -> None:
    shares = mask_share(torch.tensor([[[0, 0, 0, 1]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool))
    assert summarize_masks(shares.tolist()) == MaskSummary(pytest.approx(1.25 / 3), 0.0, 1.0, pytest.approx(1 / 3))
    assert summarize_masks([]) is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: erasure(v, v[:1], v), ValueError, "v_uncond: expected shape"),
        (lambda v: erasure(v.long(), v, v), TypeError, "velocity: expected one of the dtypes"),
        (lambda v: drift(v, v[:, :1]), ValueError, "v_cond: expected shape"),
        (lambda v: drift(v.flatten(), v.flatten()), ValueError, r"velocity: expected \(B, ...\), got shape"),
        (lambda v: localization(v, v, torch.ones(2, 2, 3, 4), 2), ValueError, "mask: expected"),
        (lambda v: Ratio().add(torch.zeros(2), drift(v, v)), ValueError, r"t: expected \(\) or \(3,\), got \(2,\)"),
    ],
)
def test_bad_arguments(call: Callable[[Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(velocities(1)[0])
