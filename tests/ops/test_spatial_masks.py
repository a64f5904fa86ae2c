"""Masks are resized exactly as `torch.nn.functional.interpolate(mode="nearest")` resizes, and checked before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunlearn.ops.spatial_masks import check_whole_steps, drop_channel, read_nearest


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


@pytest.mark.parametrize(
    ("mask", "shape", "channel_dim"),
    [
        # The token grids of the families at their usual sizes.
        ((1, 13, 30, 45), (1, 13, 16, 60, 90), 2),  # CogVideoX
        ((1, 11, 48, 85), (1, 22, 16, 96, 170), 2),  # CogVideoX 1.5: two frames a token
        ((1, 33, 45, 80), (1, 16, 33, 90, 160), 1),  # HunyuanVideo
        ((1, 21, 30, 52), (1, 16, 21, 60, 104), 1),  # Wan
        ((1, 13, 60, 90), (1, 13, 16, 60, 90), 2),  # at the latents' own resolution
        ((1, 1, 30, 45), (1, 13, 16, 60, 90), 2),  # the same for all frames
        ((1, 1, 30, 45), (1, 13, 16, 60, 90), 1),  # the same weights along either axis
        ((2, 32, 32), (2, 4, 64, 64), 1),
        ((2, 1, 8), (2, 4, 2, 8), 1),  # the same along the height
        ((2, 3, 5), (2, 4, 0, 5), 1),
    ],
)
def test_masks_that_cover_whole_steps(mask: tuple[int, ...], shape: tuple[int, ...], channel_dim: int) -> None:
    check_whole_steps(torch.ones(mask), shape, channel_dim)


@pytest.mark.parametrize(
    ("mask", "shape", "channel_dim", "message"),
    [
        (  # the frames of CogVideoX taken for channels
            (1, 13, 30, 45),
            (1, 13, 16, 60, 90),
            1,
            r"mask: expected sizes that divide \(16, 60, 90\), those of \(1, 13, 16, 60, 90\) without the batch and "
            r"channel_dim=1, .* got \(1, 13, 30, 45\); check channel_dim \(2 would fit\), .* patch_size",
        ),
        ((1, 21, 30, 52), (1, 16, 21, 60, 104), 2, r"channel_dim=2, .* check channel_dim \(1 would fit\)"),
        ((1, 13, 120, 180), (1, 13, 16, 60, 90), 2, r"got \(1, 13, 120, 180\); check channel_dim, .* patch_size"),
        ((1, 49, 60, 90), (1, 13, 16, 60, 90), 2, r"got \(1, 49, 60, 90\)"),  # a mask per frame of the video
        ((1, 13, 29, 45), (1, 13, 16, 60, 90), 2, r"got \(1, 13, 29, 45\)"),
        ((1, 13, 45, 30), (1, 13, 16, 60, 90), 2, r"got \(1, 13, 45, 30\)"),  # height and width exchanged
        ((1, 3, 60, 30), (1, 3, 16, 60, 120), 2, r"equal steps along height and width, got \(1, 3, 60, 30\)"),
        ((2, 32, 32), (2, 64, 64, 4), 1, r"check channel_dim \(3 would fit\)"),  # channels last
        ((2, 0, 5), (2, 3, 0, 7), 1, r"got \(2, 0, 5\); check channel_dim, "),
    ],
)
def test_masks_on_other_axes(mask: tuple[int, ...], shape: tuple[int, ...], channel_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_whole_steps(torch.ones(mask), shape, channel_dim)
