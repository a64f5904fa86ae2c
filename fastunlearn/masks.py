"""Masks from attention maps: normalise, average, threshold (Receler, arXiv 2311.17717, section 3.3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from fastunlearn.dtypes import MASK
from fastunlearn.ops.arguments import check_choice, check_tensor, integer_tensor
from fastunlearn.ops.spatial_masks import match_resolution

WordIndices = Sequence[int] | Tensor | None
NormalizePer = Literal["sample", "frame"]
_HEAD_NUM, _TEXT_LEN = 30, 226  # defaults of the original signature: those of CogVideoX-2B


def get_mask(
    attn_maps: Mapping[str, Tensor],
    word_indices: WordIndices,
    thres: float,
    height: int | None = None,
    width: int | None = None,
    head_num: int | None = _HEAD_NUM,
    text_len: int | None = _TEXT_LEN,
    *,
    patch_size: int = 1,
    frames: int | None = None,
    normalize_per: NormalizePer = "sample",
) -> dict[str, Tensor]:
    """Where the concept is: a binary mask per layer, and one from the average of all layers.

    Each layer's map is averaged over heads, summed over the concept's words, and normalised to [0, 1] by the minimum
    and maximum of each sample or frame. The mask is 1 where the normalised map is at least `thres`. For the average
    mask, the normalised maps are averaged over layers, normalised once more, and thresholded.

    Args:
        attn_maps: the maps by layer, as `AttnMapsCapture` fills them: probabilities (B, heads, N, text_len), or concept
            maps (B, N) if it was given token indices. (B * heads, N, text_len) is accepted too. Not modified.
        word_indices: the positions of the concept's tokens in the text, (T,) or (B, T), with -1 for none. Not used for
            (B, N) maps, which are for chosen tokens already.
        thres: the threshold, from 0 to 1.
        height: the height of the token grid times `patch_size`. Pass the latents' height together with the
            transformer's patch size, or the token grid's own height with patch size 1. None for the grid that
            `AttnMapsCapture` saw, which only its own tensors know, not copies of them.
        width: the width, in the same way.
        head_num: the number of heads in a (B * heads, N, text_len) map. Other maps do not need it, and may have None.
        text_len: the number of text tokens; only checked against the maps, or None.
        patch_size: how many latent pixels a token covers, in height and in width.
        frames: F, to be checked. N tokens fit several grids: with a forgotten patch size of 2, eight frames pass for
            two.
        normalize_per: "sample" lets a frame without the concept stay empty. "frame" gives every frame a place where the
            concept is most likely.

    Returns:
        A dict with one mask per layer, by the layer's name, and "average_mask". Each is (B, F, h, w) float32, zeros and
        ones on the token grid, with h = height / patch_size, w = width / patch_size and F = N / (h w). A constant map
        normalises to zeros.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the grid is unknown, or not that of the maps (the message suggests a `patch_size` that fits); an
            index is out of range; a map is NaN or infinite somewhere; layers differ in batch or tokens; `head_num` or
            `text_len` is neither the default nor that of the map.

    Warns:
        UserWarning: the maps do not know their grid, and a patch size of 2 would fit as well as the 1 that was given.
    """
    if not isinstance(thres, Real) or not 0 <= thres <= 1:
        raise ValueError(f"thres: expected a number from 0 to 1, got {thres!r}")
    maps = _concept_maps(attn_maps, word_indices, height, width, head_num, text_len, patch_size, frames, normalize_per)
    masks = {name: (concept >= thres).float() for name, concept in maps.items()}
    masks["average_mask"] = (_average(maps, normalize_per) >= thres).float()
    return masks


def average_map(
    attn_maps: Mapping[str, Tensor],
    word_indices: WordIndices,
    height: int | None = None,
    width: int | None = None,
    head_num: int | None = _HEAD_NUM,
    text_len: int | None = _TEXT_LEN,
    *,
    patch_size: int = 1,
    frames: int | None = None,
    normalize_per: NormalizePer = "sample",
) -> Tensor:
    """The soft mask that `get_mask` thresholds to its average mask: (B, F, h, w) float32, from 0 to 1.

    All arguments are those of `get_mask`, and so are the errors.
    """
    maps = _concept_maps(attn_maps, word_indices, height, width, head_num, text_len, patch_size, frames, normalize_per)
    return _average(maps, normalize_per)


def overlay(frames: Tensor, mask: Tensor) -> Tensor:
    """Shows a mask on a video: frames stay as they are where the mask is 1, and turn dark and grey where it is 0.

    Args:
        frames: (F, C, H, W) or (B, F, C, H, W), floating point, from 0 to 1.
        mask: (f, h, w), or (B or 1, f, h, w) with a batch, from 0 to 1, such as `get_mask` returns. It may have any
            resolution in space and time, and is read by nearest neighbour.

    Returns:
        Frames of the same shape and dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is of the wrong shape or on the wrong device.
    """
    check_tensor("frames", frames)
    check_tensor("mask", mask, MASK, like=frames)
    if frames.dim() not in (4, 5):
        raise ValueError(f"frames: expected (F, C, H, W) or (B, F, C, H, W), got {tuple(frames.shape)}")
    batched = frames if frames.dim() == 5 else frames[None]
    batched_mask = mask if frames.dim() == 5 else mask[None]
    if batched_mask.dim() != 4 or batched_mask.shape[0] not in (1, len(batched)) or 0 in batched_mask.shape[1:]:
        expected = "(f, h, w)" if frames.dim() == 4 else f"({len(batched)} or 1, f, h, w)"
        raise ValueError(f"mask: expected {expected} for these frames, got {tuple(mask.shape)}")
    weights = match_resolution(batched_mask, batched.shape, channel_dim=2).to(frames.dtype)
    grey = batched.mean(2, keepdim=True) / 2
    return torch.lerp(grey.expand_as(batched), batched, weights.expand_as(batched)).reshape(frames.shape)


def _concept_maps(
    attn_maps: Mapping[str, Tensor],
    word_indices: WordIndices,
    height: int | None,
    width: int | None,
    head_num: int | None,
    text_len: int | None,
    patch_size: int,
    frames: int | None,
    normalize_per: NormalizePer,
) -> dict[str, Tensor]:
    """The normalised map (B, F, h, w) of every layer."""
    check_choice("normalize_per", normalize_per, ("sample", "frame"))
    if not isinstance(attn_maps, Mapping):
        raise TypeError(f"attn_maps: expected a mapping from layers to tensors, got {type(attn_maps).__name__}")
    if not attn_maps:
        raise ValueError("attn_maps: expected at least one layer's map, got none")
    _check_sizes(height, width, head_num, text_len, patch_size, frames)
    maps: dict[str, Tensor] = {}
    for name, attn_map in attn_maps.items():
        check_tensor(f"attn_maps[{name!r}]", attn_map)
        concept = attn_map if attn_map.dim() == 2 else _concept_map(name, attn_map, word_indices, head_num, text_len)
        concept = concept.detach().float()
        may_warn = not maps  # once for all layers
        grid = _token_grid(name, attn_map, concept.shape[1], height, width, patch_size, frames, may_warn=may_warn)
        maps[name] = concept.reshape(concept.shape[0], *grid)
    shapes = {name: tuple(concept.shape) for name, concept in maps.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"attn_maps: expected maps of one batch and one number of tokens, got (B, F, h, w) {shapes}")
    _check_finite(maps)
    return {name: _normalise(concept, normalize_per) for name, concept in maps.items()}


def _check_finite(maps: Mapping[str, Tensor]) -> None:
    """Raises if a map has a NaN, which would normalise to an empty mask of its layer and of the average."""
    are_finite = torch.stack([concept.isfinite().all() for concept in maps.values()]).cpu().tolist()  # one wait
    for (name, concept), is_finite in zip(maps.items(), are_finite, strict=True):
        if not is_finite:
            raise ValueError(
                f"attn_maps[{name!r}]: expected finite attention, got NaN or infinity for "
                f"{(~concept.isfinite()).sum().item()} of {concept.numel()} video tokens; the model's numbers overflow "
                "in or before this layer; if it computes in float16, try bfloat16 (mixed_precision 'bf16')"
            )


def _check_sizes(height: Any, width: Any, head_num: Any, text_len: Any, patch_size: Any, frames: Any) -> None:
    optional = {"height": height, "width": width, "head_num": head_num, "text_len": text_len, "frames": frames}
    for argument, value in {**optional, "patch_size": patch_size}.items():
        if not isinstance(value, Integral) and not (value is None and argument in optional):
            raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if (height is None) != (width is None):
        raise ValueError(f"height, width: expected both or neither, got {height}, {width}")
    if patch_size < 1 or (height is not None and (min(height, width) < 1 or height % patch_size or width % patch_size)):
        raise ValueError(
            f"height, width: expected positive multiples of patch_size={patch_size}, got {height}, {width}"
        )


def _token_grid(
    name: str,
    attn_map: Tensor,
    tokens: int,
    height: int | None,
    width: int | None,
    patch_size: int,
    frames: int | None,
    *,
    may_warn: bool,
) -> tuple[int, int, int]:
    """The (F, h, w) of a layer's tokens: the one that was captured, which `height` and `width` must fit, or theirs."""
    captured: tuple[int, int, int] | None = getattr(attn_map, "token_grid", None)
    if height is None or width is None:
        if captured is None:
            raise ValueError(
                f"height, width: expected the size of the latents, with the transformer's patch_size, because the "
                f"{tokens} tokens of {name!r} do not say it (only tensors as AttnMapsCapture left them do), got None"
            )
        grid = captured
    else:
        rows, columns = height // patch_size, width // patch_size
        got = f"got {rows} x {columns} tokens per frame (height={height}, width={width}, patch_size={patch_size})"
        if tokens == 0 or tokens % (rows * columns):
            raise ValueError(
                f"height, width: expected a token grid that divides the {tokens} tokens of {name!r}, {got}"
                + _patch_size_hint(tokens, height, width)
            )
        grid = (tokens // (rows * columns), rows, columns)
        if captured not in (None, grid):
            raise ValueError(
                f"height, width: expected {captured[1]} x {captured[2]} tokens per frame, times patch_size, as "
                f"{name!r} was captured, {got}; leave them out to use those"
            )
        halves = _patch_size_hint(tokens, height, width, largest=2)
        if may_warn and captured is None and frames is None and patch_size == 1 and halves:
            warnings.warn(
                f"height, width: {height} x {width} divides the {tokens} tokens of {name!r} into {grid[0]} frames"
                f"{halves}, which gives {4 * grid[0]}; pass frames= if {grid[0]} is right",
                stacklevel=4,
            )
    if frames not in (None, grid[0]):
        raise ValueError(
            f"frames: expected {grid[0]} frames for {tokens} tokens of {grid[1]} x {grid[2]} per frame, got {frames}; "
            "check height, width and patch_size"
        )
    return grid


def _concept_map(
    name: str, attn_map: Tensor, word_indices: WordIndices, head_num: int | None, text_len: int | None
) -> Tensor:
    """The map (B, N) of one layer: probabilities summed over the concept's words and averaged over heads."""
    if attn_map.dim() == 3 and head_num is None:
        raise ValueError(
            f"head_num: expected the number of heads, which attn_maps[{name!r}] of shape {tuple(attn_map.shape)} does "
            "not tell apart from the batch, got None"
        )
    if attn_map.dim() == 3 and head_num is not None and head_num > 0 and attn_map.shape[0] % head_num == 0:
        attn_map = attn_map.reshape(-1, head_num, *attn_map.shape[1:])
    if attn_map.dim() != 4:
        raise ValueError(
            f"attn_maps[{name!r}]: expected (B, heads, N, text_len), ({head_num} * B, N, text_len) or (B, N), "
            f"got shape {tuple(attn_map.shape)}"
        )
    if word_indices is None:
        raise ValueError("word_indices: expected the concept's positions in the text, got None")
    batch, heads, tokens, length = attn_map.shape
    for argument, given, default, actual in (
        ("head_num", head_num, _HEAD_NUM, heads),
        ("text_len", text_len, _TEXT_LEN, length),
    ):
        if given not in (None, default, actual):
            raise ValueError(f"{argument}: expected {actual}, as in the map of {name!r}, got {given}")
    words = integer_tensor("word_indices", word_indices).to(attn_map.device)
    if not words.numel():
        raise ValueError(f"word_indices: expected at least one position, got {word_indices}")
    if words.dim() not in (1, 2) or (words.dim() == 2 and words.shape[0] not in (1, batch)):
        raise ValueError(f"word_indices: expected (T,) or ({batch}, T), got shape {tuple(words.shape)}")
    if words.min() < -1 or words.max() >= length:
        raise ValueError(f"word_indices: expected positions below {length} (or -1 for none), got {words.tolist()}")
    index = words.long().expand(batch, -1)[:, None, None, :].expand(-1, heads, tokens, -1)
    chosen = attn_map.gather(3, index.clamp(min=0)).float()
    return chosen.masked_fill(index < 0, 0).sum(3).mean(1)


def _normalise(concept: Tensor, per: NormalizePer) -> Tensor:
    """Scales every sample, or frame, to the range from 0 to 1; a constant one becomes zeros."""
    dims = (1, 2, 3) if per == "sample" else (2, 3)
    low, high = concept.amin(dims, keepdim=True), concept.amax(dims, keepdim=True)
    spread = high - low
    return (concept - low) / spread.masked_fill(spread == 0, 1)


def _average(maps: Mapping[str, Tensor], per: NormalizePer) -> Tensor:
    return _normalise(torch.stack(list(maps.values())).mean(0), per)


def _patch_size_hint(tokens: int, height: int, width: int, largest: int = 64) -> str:
    """A hint for callers who passed the size of the latents or of the video: the smallest patch size that fits."""
    for patch in range(2, largest + 1):
        fits = height % patch == 0 and width % patch == 0
        if fits and tokens % ((height // patch) * (width // patch)) == 0:
            return f"; if {height} x {width} is the size of the latents, pass patch_size={patch}"
    return ""
