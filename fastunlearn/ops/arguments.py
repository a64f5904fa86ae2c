"""Checks of what a caller passed, and its conversion to the one form that all backends take.

Every message reads `argument: expected what, got what came`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastunlearn.dtypes import FLOATING, INTEGER, MASK, dtype_name
from fastunlearn.ops.spatial_masks import check_whole_steps, drop_channel


def check_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING, *, like: Tensor | None = None
) -> None:
    """Raise unless `value` is a tensor of one of `dtypes`, and on the device of `like` if that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name}: expected one of the dtypes {expected}, got {dtype_name(value.dtype)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like the others, got one on {value.device}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless `value` has exactly `shape`; `meaning` says where that shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, {meaning}, got {tuple(value.shape)}")


def integer_tensor(name: str, value: object) -> Tensor:
    """A tensor of integers as it is, or nested sequences of integers as a tensor."""
    if not isinstance(value, Tensor):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected integers, or rows of them of equal length, got {value!r}") from error
        value = tensor if tensor.numel() else tensor.long()
    check_tensor(name, value, INTEGER)
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a plain number. Reading a number from a tensor would wait for its device."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def velocity_arguments(
    prediction: Tensor,
    target: Tensor,
    target_name: str,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    channel_dim: int,
    loss_type: str,
    reduction: str,
    mask_normalization: str,
    weight: float,
) -> dict[str, Any]:
    """Check what both velocity losses take. Returns the keyword arguments of the backends' functions."""
    if prediction.dim() == 0:
        raise ValueError("prediction: expected at least a batch dim, got a tensor without dims")
    check_tensor(target_name, target, like=prediction)
    check_shape(target_name, target, prediction.shape, "that of prediction")
    check_choice("loss_type", loss_type, ("l2", "l1"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_choice("mask_normalization", mask_normalization, ("all", "mask"))
    check_number("weight", weight)
    if mask is not None:
        check_tensor("mask", mask, MASK, like=prediction)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int) or not 1 <= channel_dim < prediction.dim():
            raise ValueError(f"channel_dim: expected an integer from 1 to {prediction.dim() - 1}, got {channel_dim!r}")
        mask = drop_channel(mask.detach(), prediction.shape, channel_dim)
        check_whole_steps(mask, prediction.shape, channel_dim)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, MASK, like=prediction)
        check_shape("sample_weight", sample_weight, prediction.shape[:1], "one weight per sample")
        sample_weight = sample_weight.detach()
    return {
        "mask": mask,
        "sample_weight": sample_weight,
        "channel_dim": channel_dim,
        "loss_type": loss_type,
        "reduction": reduction,
        "mask_normalization": mask_normalization,
        "weight": weight,
    }


def named_layers(eraser_outputs: object) -> dict[Any, Any]:
    """Eraser outputs by layer name, or by position if they have no names."""
    if isinstance(eraser_outputs, Mapping):
        return dict(eraser_outputs)
    if isinstance(eraser_outputs, Sequence) and not isinstance(eraser_outputs, str):
        return dict(enumerate(eraser_outputs))
    raise TypeError(f"eraser_outputs: expected a sequence or mapping of tensors, got {type(eraser_outputs).__name__}")


def check_low_rank(name: str, hidden: object, weight: object, bias: object, *, like: Tensor | None = None) -> None:
    """Raise unless the three tensors make tokens hidden @ weight.T + bias."""
    check_tensor(f"{name}.hidden", hidden, like=like)
    assert isinstance(hidden, Tensor)
    check_tensor(f"{name}.weight", weight, like=hidden)
    assert isinstance(weight, Tensor)
    if hidden.dim() != 3:
        raise ValueError(f"{name}.hidden: expected shape (B, N, r), got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"{name}.weight: expected shape (D, {hidden.shape[2]}) for this hidden, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor(f"{name}.bias", bias, like=hidden)
        assert isinstance(bias, Tensor)
        check_shape(f"{name}.bias", bias, weight.shape[:1], "one number per row of weight")


def layer_mask(mask: Tensor, output: Tensor, layer: object) -> Tensor:
    """Check the mask of one layer. Returns it in the form that backends take: (B or 1, N) for tokens."""
    name = f"mask of layer {layer!r}"
    if output.dim() < 3:
        raise ValueError(
            f"eraser_outputs[{layer}]: expected tokens (B, N, D) or a feature map (B, C, *spatial), "
            f"got {tuple(output.shape)}"
        )
    check_tensor(name, mask, MASK, like=output)
    if output.dim() > 3:
        return drop_channel(mask.detach(), output.shape, 1, name)
    batch, tokens, _ = output.shape
    if mask.dim() < 2 or mask.shape[0] not in (1, batch) or mask.shape[1:].numel() != tokens:
        raise ValueError(
            f"{name}: expected (B or 1, *grid) with {tokens} positions, one per token of {tuple(output.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    return mask.detach().flatten(1)


def token_index_rows(token_indices: Tensor | Sequence[int], batch: int, keys: int) -> Tensor:
    """The indices as (B, T) int64. Their values are checked only where that does not wait for a device."""
    token_indices = integer_tensor("token_indices", token_indices)
    if token_indices.dim() not in (1, 2) or (token_indices.dim() == 2 and token_indices.shape[0] != batch):
        raise ValueError(f"token_indices: expected shape (T,) or ({batch}, T), got {tuple(token_indices.shape)}")
    indices = token_indices.long().expand(batch, -1)
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        # There are few: a list is read faster than tensors are compared.
        for index in token_indices.flatten().tolist():
            if not -1 <= index < keys:
                raise ValueError(f"token_indices: expected -1 to {keys - 1}, the last key, got {index}")
    return indices
