"""The demo's picture: prompts by rows, before | mask | after, and the loss curve beside."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastunlearn.files import replace_file
from fastunlearn.masks import overlay

GAP = 2  # pixels between frames
TERMS = {
    "unlearning_loss": ("unlearning", "#d1495b"),
    "preservation_loss": ("preservation", "#2e7d6b"),
    "localization_loss": ("localization", "#5b6bbf"),
}
SMOOTHED_OVER = 10  # steps


@dataclass(frozen=True)
class Row:
    """One prompt: its video before and after, (F, 3, H, W) in [0, 1], and its mask, (F, h, w), if it has one."""

    prompt: str
    before: Tensor
    mask: Tensor | None
    after: Tensor


def _strip(frames: Tensor) -> Tensor:
    """(F, 3, H, W) in [0, 1] to one white-gapped (H, F * W + gaps, 3) image in [0, 1]."""
    gap = torch.ones(3, frames.shape[2], GAP)
    parts = [part for frame in frames.cpu() for part in (frame, gap)][:-1]
    return torch.cat(parts, dim=2).permute(1, 2, 0)


def draw(rows: Sequence[Row], history: Sequence[Mapping[str, float]], concept: str, path: Path) -> None:
    """Writes the PNG, whole or not at all. `history`: the metrics of every step of training."""
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(15, 0.95 * len(rows) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(rows), 4, width_ratios=[1, 1, 1, 0.95])
    for index, row in enumerate(rows):
        columns = {
            "before": _strip(row.before),
            f"mask of “{concept}”": None if row.mask is None else _strip(overlay(row.before, row.mask)),
            f"“{concept}” erased": _strip(row.after),
        }
        for column, (title, image) in enumerate(columns.items()):
            axes = figure.add_subplot(grid[index, column])
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if image is None:
                axes.text(0.5, 0.5, "not asked for", ha="center", va="center", color="0.6", transform=axes.transAxes)
            else:
                axes.imshow(image.numpy(), interpolation="nearest")
            if index == 0:
                axes.set_title(title, fontsize=12)
            if column == 0:
                axes.set_ylabel(
                    row.prompt.replace(" and ", "\nand "), rotation=0, ha="right", va="center", fontsize=10, labelpad=8
                )
    axes = figure.add_subplot(grid[:, 3])
    for name, (label, colour) in TERMS.items():
        values = torch.tensor([step[name] for step in history])
        smooth = values.unfold(0, min(SMOOTHED_OVER, len(values)), 1).mean(1)
        axes.plot(values.numpy(), color=colour, alpha=0.2, linewidth=1)
        axes.plot(range(len(values) - len(smooth), len(values)), smooth.numpy(), color=colour, linewidth=2, label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4)
    axes.set_xlabel("training step")
    axes.set_title("weighted loss terms", fontsize=12)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    replace_file(path, content.getvalue())
