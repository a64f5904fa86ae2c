"""The demo's picture: one row per prompt with the video before, the mask and the video after; then the losses."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
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
SMOOTHED_STEPS = 10  # length of the moving average


@dataclass(frozen=True)
class Row:
    """A prompt, its videos before and after, (F, 3, H, W) in [0, 1], and its mask, (F, h, w), if it has one."""

    prompt: str
    before: Tensor
    mask: Tensor | None
    after: Tensor


def draw(rows: Sequence[Row], history: Sequence[Mapping[str, float]], concept: str, path: Path) -> None:
    """Writes the picture to `path` as a PNG file, completely or not at all.

    Args:
        rows: the prompts and videos to show.
        history: the metrics of every training step.
        concept: the erased concept.
        path: the file to write.
    """
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(15, 0.95 * len(rows) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(rows), 4, width_ratios=[1, 1, 1, 0.95])
    for index, row in enumerate(rows):
        _draw_row([figure.add_subplot(grid[index, column]) for column in range(3)], row, concept, is_first=index == 0)
    _draw_losses(figure.add_subplot(grid[:, 3]), history)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    replace_file(path, content.getvalue())


def _draw_row(columns: Sequence[Axes], row: Row, concept: str, *, is_first: bool) -> None:
    images = {
        "before": _strip(row.before),
        f"mask of “{concept}”": None if row.mask is None else _strip(overlay(row.before, row.mask)),
        f"“{concept}” erased": _strip(row.after),
    }
    for axes, (title, image) in zip(columns, images.items(), strict=True):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if image is None:
            axes.text(0.5, 0.5, "not asked for", ha="center", va="center", color="0.6", transform=axes.transAxes)
        else:
            axes.imshow(image.numpy(), interpolation="nearest")
        if is_first:
            axes.set_title(title, fontsize=12)
    label = row.prompt.replace(" and ", "\nand ")
    columns[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)


def _strip(frames: Tensor) -> Tensor:
    """Joins frames (F, 3, H, W) in [0, 1] into one image (H, F * W + gaps, 3), with white gaps."""
    gap = torch.ones(3, frames.shape[2], GAP)
    pieces = [piece for frame in frames.cpu() for piece in (frame, gap)][:-1]
    return torch.cat(pieces, dim=2).permute(1, 2, 0)


def _draw_losses(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    for name, (label, colour) in TERMS.items():
        values = torch.tensor([step[name] for step in history])
        smooth = values.unfold(0, min(SMOOTHED_STEPS, len(values)), 1).mean(1)
        axes.plot(values.numpy(), color=colour, alpha=0.2, linewidth=1)
        axes.plot(range(len(values) - len(smooth), len(values)), smooth.numpy(), color=colour, linewidth=2, label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"weighted loss (thick: mean of {SMOOTHED_STEPS} steps)")
    axes.set_title("loss terms", fontsize=12)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
