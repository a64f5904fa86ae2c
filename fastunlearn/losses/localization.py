"""The localization loss: keeps erasers silent outside the concept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastunlearn.functional import (
    LocalizationLoss,
    LocalizationNormalization,
    LossType,
    LowRankOutput,
    Reduction,
    localization_loss,
)
from fastunlearn.ops.arguments import check_choice
from fastunlearn.ops.dispatch import Backend
from fastunlearn.ops.sharded import check_group

EraserOutputs = Mapping[str, Tensor | LowRankOutput]


def check_eraser_outputs(eraser_outputs: object) -> None:
    """Raises TypeError unless the outputs come by name: a sequence has no names for the entries of the loss dict."""
    if not isinstance(eraser_outputs, Mapping):
        raise TypeError(
            f"eraser_outputs: expected a mapping from eraser names to outputs, got {type(eraser_outputs).__name__}"
        )


class MaskLocalizationLoss(nn.Module):
    """Keeps erasers silent outside the concept: `1/L sum_l 1/B sum rho(o^l (1 - M))` (T2VUnlearning, arXiv:2505.17550).

    Args:
        loss_type: rho, "l2" (square) or "l1" (absolute value).
        reduction: over layers: "mean", "sum", or "none" for one loss per layer, (L,).
        normalization: what a layer's sum over samples, tokens and features is divided by: "sum" divides by the batch
            size, as above; "mean" by the number of elements; "background_mean" by the number of background elements
            (Receler, arXiv:2311.17717).
        backend: "torch", "compile", "triton", or None for the best one available.
        group: a process group whose processes hold one shard of the tensors each; see `fastunlearn.functional`.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        loss_type: LossType = "l2",
        reduction: Reduction = "mean",
        *,
        normalization: LocalizationNormalization = "sum",
        backend: Backend | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_choice("loss_type", loss_type, get_args(LossType))
        check_choice("reduction", reduction, get_args(Reduction))
        check_choice("normalization", normalization, get_args(LocalizationNormalization))
        check_group(group)
        self.loss_type = loss_type
        self.reduction = reduction
        self.normalization = normalization
        self.backend = backend
        self.group = group

    def forward(
        self, eraser_outputs: EraserOutputs, mask: Tensor | Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of what `EraserOutputsCapture` captured.

        Args:
            eraser_outputs: each eraser's output by name: (B, N, D) tokens, (B, C, *spatial) feature maps, or
                `LowRankOutput`s.
            mask: (B, F, h, w) on the token grid, 1 on the concept; or a mapping with one such mask per layer, by the
                names in `eraser_outputs`.

        Returns:
            The loss, and a dict with total_loss, num_layers and {eraser_name}/loss. An empty mapping gives 0.
        """
        check_eraser_outputs(eraser_outputs)
        if self.reduction == "none":
            losses = [self._layers_loss({name: output}, mask).loss for name, output in eraser_outputs.items()]
            loss = torch.stack(losses) if losses else self._layers_loss({}, mask).per_layer
            return loss, self._loss_dict(loss, loss.detach(), eraser_outputs)
        weight = len(eraser_outputs) if self.reduction == "sum" else 1.0
        loss, per_layer = self._layers_loss(eraser_outputs, mask, weight)
        return loss, self._loss_dict(loss, per_layer, eraser_outputs)

    def _layers_loss(
        self, eraser_outputs: EraserOutputs, mask: Tensor | Mapping[str, Tensor], weight: float = 1.0
    ) -> LocalizationLoss:
        """The mean over layers, times `weight`, and each layer's own loss without it."""
        return localization_loss(
            eraser_outputs,
            mask,
            loss_type=self.loss_type,
            normalization=self.normalization,
            weight=weight,
            backend=self.backend,
            group=self.group,
        )

    @staticmethod
    def _loss_dict(
        loss: Tensor, per_layer: Tensor, eraser_outputs: EraserOutputs, weight: float = 1.0
    ) -> dict[str, Tensor]:
        """The entries for a loss that includes the factor `weight`; the entries do not include it."""
        entries = {
            "total_loss": loss.detach() / weight,
            # Filled on the device: copying a number there would make the host wait.
            "num_layers": torch.full((), len(eraser_outputs), device=loss.device),
        }
        return entries | {f"{name}/loss": layer for name, layer in zip(eraser_outputs, per_layer, strict=True)}
