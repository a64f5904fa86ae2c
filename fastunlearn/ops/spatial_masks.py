"""Masks at the resolution of the tensor that they weight.

Inside the library a mask has one form: (B or 1, *spatial), without a channel dim, at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def drop_channel(mask: Tensor, shape: Sequence[int], channel_dim: int, name: str = "mask") -> Tensor:
    """Check a mask against the `shape` of the tensor that it weights. Returns it without a channel dim.

    Args:
        mask: (B or 1, *spatial), or the same with a dim of size 1 at `channel_dim`. Spatial sizes may differ from
            those of `shape`.
        shape: the weighted tensor's shape, batch first.
        channel_dim: the channel's dim in `shape`.
        name: what an error message calls the mask.

    Raises:
        ValueError: the number of dims, the batch size or the channel size does not fit.
    """
    expected = [shape[0], *_spatial(shape, channel_dim)]
    if mask.dim() == len(shape) and mask.shape[channel_dim] == 1:
        mask = mask.squeeze(channel_dim)
    if mask.dim() != len(expected) or mask.shape[0] not in (1, shape[0]) or _lacks_positions(mask.shape, expected):
        raise ValueError(
            f"{name}: expected (B or 1, *spatial), or the same with size 1 at dim {channel_dim}, for a tensor of shape "
            f"{tuple(shape)}, for example {tuple(expected)}, got {tuple(mask.shape)}"
        )
    return mask


def _lacks_positions(mask_shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether the mask is empty in a spatial dim where the tensor is not."""
    return any(mask_size == 0 != size for mask_size, size in zip(mask_shape[1:], expected[1:], strict=True))


def check_whole_steps(mask: Tensor, shape: Sequence[int], channel_dim: int) -> None:
    """Check that a mask without channel dim could come from the token grid of latents of `shape`.

    Every token covers a whole number of latent positions in each dim. A mask on the wrong axes rarely fits in this way,
    while `read_nearest` would read any mask without a word.

    Raises:
        ValueError: a size of the mask does not divide that of the tensor, or height and width are exchanged.
    """
    if covers(mask, shape, channel_dim):
        return
    others = [dim for dim in range(1, len(shape)) if dim != channel_dim and covers(mask, shape, dim)]
    hint = f" ({others[0]} would fit)" if others else ""
    raise ValueError(
        f"mask: expected sizes that divide {tuple(_spatial(shape, channel_dim))}, those of {tuple(shape)} without the "
        f"batch and channel_dim={channel_dim}, in equal steps along height and width, got {tuple(mask.shape)}; check "
        f"channel_dim{hint}, and the height, width and patch_size that the mask was made with"
    )


def _spatial(shape: Sequence[int], channel_dim: int) -> list[int]:
    return [*shape[1:channel_dim], *shape[channel_dim + 1 :]]


def covers(mask: Tensor, shape: Sequence[int], channel_dim: int) -> bool:
    """Whether every position of a mask without channel dim covers a whole number of positions of a tensor of `shape`.

    A mask whose height and width are exchanged does not, whatever its sizes.
    """
    sizes = _spatial(shape, channel_dim)
    pairs = zip(mask.shape[1:], sizes, strict=True)
    # A dim without positions fits any mask.
    if any(size and (not mask_size or size % mask_size) for mask_size, size in pairs):
        return False
    if len(sizes) < 2 or 1 in mask.shape[-2:] or 0 in sizes:
        return True
    (rows, columns), (height, width) = mask.shape[-2:], sizes[-2:]
    exchanged = height * columns != width * rows and height * rows == width * columns
    return not exchanged


def read_nearest(mask: Tensor, spatial: Sequence[int]) -> Tensor:
    """The mask (B or 1, *any) resized to `spatial`, exactly as `F.interpolate(mode="nearest")` resizes."""
    for dim, size in enumerate(spatial, start=1):
        if size == 0:
            mask = mask.narrow(dim, 0, 0)
        elif mask.shape[dim] != size:
            # Interpolating the positions themselves gives exactly the positions that `interpolate` picks.
            positions = torch.arange(mask.shape[dim], device=mask.device, dtype=torch.float32)
            nearest = F.interpolate(positions[None, None], size=size, mode="nearest")[0, 0]
            mask = mask.index_select(dim, nearest.long())
    return mask


def match_resolution(mask: Tensor, shape: Sequence[int], channel_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The mask at the resolution of a tensor of `shape`, with size 1 at `channel_dim`, ready to broadcast over it.

    Args:
        mask: (B or 1, *any), without a channel dim.
        shape: of the tensor, batch first.
        channel_dim: the channel's dim in `shape`.
        dtype: of the result; that of the mask if None.
    """
    spatial, dtype = _spatial(shape, channel_dim), dtype or mask.dtype
    if list(mask.shape[1:]) == spatial:
        return mask.to(dtype).unsqueeze(channel_dim)
    if not dtype.is_floating_point or len(spatial) > 3 or 0 in mask.shape or torch.compiler.is_compiling():
        return read_nearest(mask, spatial).to(dtype).unsqueeze(channel_dim)
    mask = mask.to(dtype)
    if len(spatial) == 3 and mask.shape[1] == spatial[0]:
        # Its frames as channels: much faster than with three spatial dims.
        return F.interpolate(mask, size=spatial[1:], mode="nearest").unsqueeze(channel_dim)
    return F.interpolate(mask[:, None], size=spatial, mode="nearest")[:, 0].unsqueeze(channel_dim)


def expanded_sum(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """The sum of `x` after broadcasting it to `shape`."""
    return x.sum(dtype=dtype) * (math.prod(shape) // max(x.numel(), 1))
