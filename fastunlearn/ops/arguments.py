"""What a caller passed, checked and brought to the one form that implementations take.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastunlearn.ops.spatial_masks import drop_channel

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASK = (torch.bool, *INTEGER, *FLOATING)


def check_tensor(
    name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING, *, like: Tensor | None = None
) -> None:
    """Raise unless `value` is a tensor of one of `dtypes`, on the device of `like` where that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {expected}; got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {value.device}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless `value` has exactly `shape`; `meaning` says where that shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {meaning}; got {tuple(value.shape)}")


def integer_tensor(name: str, value: object) -> Tensor:
    """A tensor of integers, or nested sequences of them as one."""
    if not isinstance(value, Tensor):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be integers, or rows of them of one length; got {value!r}") from error
        value = tensor if tensor.numel() else tensor.long()
    check_tensor(name, value, INTEGER)
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a plain number; a tensor would have to be waited for."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


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
    """What both velocity losses check, as the keyword arguments of their implementations."""
    if prediction.dim() == 0:
        raise ValueError("prediction must have a batch dim, got a tensor without dims")
    check_tensor(target_name, target, like=prediction)
    check_shape(target_name, target, prediction.shape, "that of prediction")
    check_choice("loss_type", loss_type, ("l2", "l1"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_choice("mask_normalization", mask_normalization, ("all", "mask"))
    check_number("weight", weight)
    if mask is not None:
        check_tensor("mask", mask, MASK, like=prediction)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int) or not 1 <= channel_dim < prediction.dim():
            raise ValueError(f"channel_dim must be from 1 to {prediction.dim() - 1}, got {channel_dim!r}")
        mask = drop_channel(mask.detach(), prediction.shape, channel_dim)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, MASK, like=prediction)
        check_shape("sample_weight", sample_weight, prediction.shape[:1], "one weight a sample")
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
    """Eraser outputs by layer name, or by position where they come without names."""
    if isinstance(eraser_outputs, Mapping):
        return dict(eraser_outputs)
    if isinstance(eraser_outputs, Sequence) and not isinstance(eraser_outputs, str):
        return dict(enumerate(eraser_outputs))
    raise TypeError(f"eraser_outputs must be a sequence or mapping of tensors, got {type(eraser_outputs).__name__}")


def check_low_rank(name: str, hidden: object, weight: object, bias: object, *, like: Tensor | None = None) -> None:
    """Raise unless the three make an output hidden @ weight.T + bias of tokens."""
    check_tensor(f"{name}.hidden", hidden, like=like)
    assert isinstance(hidden, Tensor)
    check_tensor(f"{name}.weight", weight, like=hidden)
    assert isinstance(weight, Tensor)
    if hidden.dim() != 3:
        raise ValueError(f"{name}.hidden must be (B, N, r), got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"{name}.weight must be (D, {hidden.shape[2]}) for this hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(f"{name}.bias", bias, like=hidden)
        assert isinstance(bias, Tensor)
        check_shape(f"{name}.bias", bias, weight.shape[:1], "that of weight's rows")


def layer_mask(mask: Tensor, output: Tensor, layer: object) -> Tensor:
    """The mask of one layer in the form that implementations take: (B or 1, N) for tokens."""
    name = f"the mask of layer {layer!r}"
    if output.dim() < 3:
        raise ValueError(
            f"eraser_outputs[{layer}] must be tokens (B, N, D) or a feature map (B, C, *spatial), "
            f"got {tuple(output.shape)}"
        )
    check_tensor(name, mask, MASK, like=output)
    if output.dim() > 3:
        return drop_channel(mask.detach(), output.shape, 1, name)
    batch, tokens, _ = output.shape
    if mask.dim() < 2 or mask.shape[0] not in (1, batch) or mask.shape[1:].numel() != tokens:
        raise ValueError(
            f"{name} must be (B or 1, *grid) with {tokens} positions, one a token of {tuple(output.shape)}; "
            f"got {tuple(mask.shape)}"
        )
    return mask.detach().flatten(1)


def token_index_rows(token_indices: Tensor | Sequence[int], batch: int, keys: int) -> Tensor:
    """As (B, T) int64, the values checked where that waits for no device."""
    token_indices = integer_tensor("token_indices", token_indices)
    if token_indices.dim() not in (1, 2) or (token_indices.dim() == 2 and token_indices.shape[0] != batch):
        raise ValueError(f"token_indices must be (T,) or ({batch}, T), got {tuple(token_indices.shape)}")
    indices = token_indices.long().expand(batch, -1)
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = indices[(indices < -1) | (indices >= keys)]
        if outside.numel():
            raise ValueError(f"token_indices must be from -1 to {keys - 1}, the last key; got {outside[0].item()}")
    return indices
