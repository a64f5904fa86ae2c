"""Reading a mask at the resolution of the tensor it weighs.

Inside the library a mask has one form: (B or 1, *spatial), no channel dim, of any resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def drop_channel(mask: Tensor, shape: Sequence[int], channel_dim: int, name: str = "mask") -> Tensor:
    """The mask as (B or 1, *spatial), checked against the `shape` of the tensor that it weighs.

    Args:
        mask: (B or 1, *spatial), or the same with a dim of size 1 at `channel_dim`. The spatial sizes are free.
        shape: the weighed tensor's shape, B first.
        channel_dim: which dim of `shape` is the channel.
        name: what the error calls the mask.

    Raises:
        ValueError: the mask has another number of dims, batch size or channel size.
    """
    wanted = list(shape[:channel_dim]) + list(shape[channel_dim + 1 :])
    if mask.dim() == len(shape) and mask.shape[channel_dim] == 1:
        mask = mask.squeeze(channel_dim)
    if mask.dim() != len(wanted) or mask.shape[0] not in (1, shape[0]) or _reads_nothing(mask.shape, wanted):
        raise ValueError(
            f"{name} must be (B or 1, *spatial) or have size 1 at dim {channel_dim}, for a tensor of shape "
            f"{tuple(shape)}, for example {tuple(wanted)}; got {tuple(mask.shape)}"
        )
    return mask


def _reads_nothing(have: Sequence[int], wanted: Sequence[int]) -> bool:
    return any(have_size == 0 != size for have_size, size in zip(have[1:], wanted[1:], strict=True))


def read_nearest(mask: Tensor, spatial: Sequence[int]) -> Tensor:
    """The mask (B or 1, *any) read at the resolution `spatial`, as `F.interpolate(mode="nearest")` reads it."""
    for dim, size in enumerate(spatial, start=1):
        if size == 0:
            mask = mask.narrow(dim, 0, 0)
        elif mask.shape[dim] != size:
            # Interpolating the positions themselves gives exactly the positions that `interpolate` reads.
            positions = torch.arange(mask.shape[dim], device=mask.device, dtype=torch.float32)
            nearest = F.interpolate(positions[None, None], size=size, mode="nearest")[0, 0]
            mask = mask.index_select(dim, nearest.long())
    return mask


def match_resolution(mask: Tensor, shape: Sequence[int], channel_dim: int) -> Tensor:
    """The mask at the resolution of a tensor of `shape`, with size 1 at `channel_dim`, to broadcast over it."""
    return read_nearest(mask, [*shape[1:channel_dim], *shape[channel_dim + 1 :]]).unsqueeze(channel_dim)
