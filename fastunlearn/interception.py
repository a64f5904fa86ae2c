"""Intercepts a model's attention while it runs, to get its queries, keys and log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

_BLOCK_ELEMENTS = 2**24  # how many logits to hold at once when the log-sum-exp has to be computed: 64 MB in float32


class Attention(NamedTuple):
    """An attention that ran.

    Attributes:
        query: (B, H, Sq, d).
        key: (B, H, Sk, d).
        mask: the attention mask, which broadcasts to (B, H, Sq, Sk), or None.
        scale: the factor of query . key.
        lse: (B, H, Sq), the log-sum-exp of the logits over all keys; None if the attention did not return it.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    lse: Tensor | None

    @property
    def key_mask(self) -> Tensor | None:
        """(B, Sk), True where attended: the mask, if it is boolean and the same for all heads and queries."""
        return None if self.mask is None else self.mask[:, 0, 0].expand(self.query.shape[0], -1)

    @property
    def masks_keys_only(self) -> bool:
        """Whether `key_mask` is equivalent to the mask."""
        mask = self.mask
        return mask is None or (mask.dtype is torch.bool and mask.shape[1] == mask.shape[2] == 1)

    def with_lse(self) -> Attention:
        """The same attention, with its log-sum-exp, computed if need be."""
        if self.lse is not None:
            return self
        return self._replace(lse=_log_sum_exp(self.query, self.key, self.mask, self.scale))

    def part(self, rows: slice, keys: slice) -> Attention:
        """The attention of some queries to some keys. The log-sum-exp is still over all keys."""
        mask = None if self.mask is None else _rows(self.mask, rows)[..., keys]
        lse = None if self.lse is None else self.lse[:, :, rows]
        return Attention(self.query[:, :, rows], self.key[:, :, keys], mask, self.scale, lse)

    def probabilities(self) -> Tensor:
        """The attention probabilities (B, H, Sq, Sk), float32. Call `with_lse` first."""
        assert self.lse is not None
        logits = _logits(self.query, self.key, self.mask, self.scale)
        # A query whose keys are all masked attends to nothing; -inf - -inf would be NaN.
        lse = self.lse.masked_fill(self.lse == -torch.inf, 0)
        return logits.sub_(lse[..., None]).exp_().float()


def _rows(mask: Tensor, rows: slice) -> Tensor:
    return mask[:, :, rows] if mask.shape[2] > 1 else mask


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(dtype) @ key.to(dtype).mT).mul_(scale)
    if mask is None:
        return logits
    return logits.masked_fill_(~mask, -torch.inf) if mask.dtype is torch.bool else logits.add_(mask)


def _log_sum_exp(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The log-sum-exp (B, H, Sq), computed for a block of queries at a time."""
    step = max(1, _BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * key.shape[2]))
    blocks = [slice(start, start + step) for start in range(0, query.shape[2], step)]
    return torch.cat(
        [
            _logits(query[:, :, rows], key, None if mask is None else _rows(mask, rows), scale).logsumexp(3)
            for rows in blocks
        ],
        2,
    )


class Interception(TorchFunctionMode):
    """Passes every scaled dot-product attention to `keep`. The attention's result stays the same, bit for bit."""

    def __init__(self, keep: Callable[[Attention], None]) -> None:
        super().__init__()
        self._keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal:
            raise ValueError("is_causal: expected False, got True; maps of causal attention are not supported")
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"key: expected {query.shape[1]} heads, as in query, got {key.shape[1]}; "
                "maps of grouped-query attention are not supported"
            )
        device = query.device.type
        if torch.is_autocast_enabled(device):  # attention casts its inputs, so the maps must be of the cast ones
            query, key, value = (_autocast(tensor) for tensor in (query, key, value))
            attn_mask = None if attn_mask is None else _autocast(attn_mask)
        output_and_lse = None if dropout_p or _is_nested() else _attention_and_lse(query, key, value, attn_mask, scale)
        if output_and_lse is None:
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=enable_gqa
            )
        else:
            output = output_and_lse[0]
        query, key = query.detach(), key.detach()
        mask = None
        if attn_mask is not None:
            mask = attn_mask.detach()[(None,) * (4 - attn_mask.dim())]
            mask = mask.expand(*mask.shape[:3], key.shape[2])
        scale = query.shape[3] ** -0.5 if scale is None else scale
        lse = None if output_and_lse is None else output_and_lse[1].detach()
        with torch.autocast(device, enabled=False):  # the maps are float32 whatever the model computes in
            self._keep(Attention(query, key, mask, scale, lse))
        return output


def _autocast(tensor: Tensor) -> Tensor:
    """Casts an input as autocast does for an attention: floating-point tensors, except float64."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _is_nested() -> bool:
    """Whether another interception is active around this one.

    The outer one recognises `scaled_dot_product_attention` only, not the operators that it dispatches to.
    """
    active = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, Interception) for mode in active)


def _attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """The attention's output and log-sum-exp, or None if the log-sum-exp is not available.

    Calls the operator that scaled_dot_product_attention would dispatch to, because only the operator returns it.
    """
    if torch.compiler.is_compiling():
        return None
    aten, device = torch.ops.aten, query.device.type
    choice = torch._fused_sdp_choice(query, key, value, mask, scale=scale)
    if choice == SDPBackend.FLASH_ATTENTION.value and device == "cpu":
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)
    # On a GPU, PyTorch pads a mask before it calls the operator. Repeating that here would not be safe.
    if mask is not None or device != "cuda" or torch.version.hip is not None:
        return None
    if choice == SDPBackend.FLASH_ATTENTION.value and query.shape[-1] % 8 == 0:  # PyTorch pads other head sizes
        return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    if choice == SDPBackend.EFFICIENT_ATTENTION.value:
        output, lse = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)[:2]
        return output, lse[:, :, : query.shape[2]]  # the operator pads the log-sum-exp
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        output, lse = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[:2]
        return output, lse.view(query.shape[:3])  # (B, H, Sq, 1)
    return None
