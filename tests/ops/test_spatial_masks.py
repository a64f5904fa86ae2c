"""Masks are resized exactly as `torch.nn.functional.interpolate(mode="nearest")` resizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunlearn.ops.spatial_masks import drop_channel, read_nearest


def test_every_pair_of_sizes() -> None:
    for size_in in range(1, 40):
        mask = torch.rand(1, size_in)
        for size_out in range(1, 40):
            expected = F.interpolate(mask[:, None], size=size_out, mode="nearest")[:, 0]
            assert torch.equal(read_nearest(mask, (size_out,)), expected)


@pytest.mark.parametrize("spatial", [(7,), (5, 9), (4, 5, 9), (13, 60, 90)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_one_to_three_dims(spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = (10 * torch.rand(2, *[(size + 1) // 2 for size in spatial])).to(dtype)
    expected = F.interpolate(mask[:, None].float(), size=spatial, mode="nearest")[:, 0]
    assert torch.equal(read_nearest(mask, spatial), expected.to(dtype))


def test_more_than_three_dims_are_resized_one_by_one() -> None:
    mask = torch.rand(1, 2, 2, 2, 3)
    expected = mask.repeat_interleave(2, 1).repeat_interleave(3, 4)
    assert torch.equal(read_nearest(mask, (4, 2, 2, 9)), expected)


def test_equal_sizes_copy_nothing() -> None:
    mask = torch.rand(2, 3, 4)
    assert read_nearest(mask, (3, 4)).data_ptr() == mask.data_ptr()


def test_a_channel_dim_of_size_one_is_dropped() -> None:
    assert drop_channel(torch.rand(2, 3, 1, 4, 5), (2, 3, 8, 4, 5), 2).shape == (2, 3, 4, 5)
    assert drop_channel(torch.rand(1, 3, 4, 5), (2, 8, 3, 4, 5), 1).shape == (1, 3, 4, 5)


def test_sizes_of_zero() -> None:
    assert drop_channel(torch.rand(2, 5, 7), (2, 3, 0, 7), 1).shape == (2, 5, 7)
    assert read_nearest(torch.rand(2, 5, 7), (0, 7)).shape == (2, 0, 7)
    with pytest.raises(ValueError, match=r"got \(2, 0, 7\)"):
        drop_channel(torch.rand(2, 0, 7), (2, 3, 5, 0), 1)
