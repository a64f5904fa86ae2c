"""Shows an evaluation as a table and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from fastunlearn.files import replace_file

Report = Mapping[str, Any]  # what evaluation.json holds

_ERASED, _KEPT, _INSIDE, _REFERENCE = "#d1495b", "#2e7d6b", "#5b6bbf", "0.55"


def table(report: Report) -> str:
    """The metrics as text: a row per range of timesteps, from noise to video, then the totals and how to read them."""
    heads = ("timestep", "erasure coefficient", "change inside mask", "drift on kept prompts")
    lines = ["".join(f"{head:>23}" for head in heads)[11:]]
    for row in report["by_timesteps"]:
        first, last = f"{row['from']:.0f}", f"{row['to']:.0f}"
        lines.append(_row(first if first == last else f"{first} - {last}", row))
    return "\n".join([*lines, _row("total", report), "", *_remarks(report)])


def _row(name: str, values: Report) -> str:
    cells = (
        _shown(values["erasure_coefficient"], ".2f"),
        _shown(values["localization"], ".0%"),
        _shown(values["preserved_drift"], ".4f"),
    )
    return f"{name:>12}" + "".join(f"{cell:>23}" for cell in cells)


def _remarks(report: Report) -> Iterator[str]:
    """The lines below the table."""
    concept = "the concept" if report["concept"] is None else f'"{report["concept"]}"'
    yield f"{report['target_points']} points with {concept}, {report['kept_points']} without"
    yield "erasure coefficient     1: nothing erased; 0: the concept has no effect; below 0: the model avoids it"
    share = report["mask_share"]
    if share is not None:
        yield (
            f"mask                    {share['mean']:.0%} of the tokens ({share['least']:.0%} to {share['most']:.0%}); "
            f"empty at {share['empty']:.0%} of the points"
        )
    if report["frozen_drift"] is not None:
        yield f"drift by rounding       {report['frozen_drift']:.4f}"
    rows = [row for row in report["by_prompt"] if row.get("erasure_coefficient") is not None]
    if rows:
        worst = max(rows, key=lambda row: row["erasure_coefficient"])
        yield f"least erased            {worst['erasure_coefficient']:.2f}  {_short(worst['prompt'])}"


def draw(report: Report, path: Path) -> None:
    """Draws erasure, drift and localization over the timesteps, from noise on the left to video on the right.

    Args:
        report: the evaluation.
        path: the PNG file to write.
    """
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(14, 4.2), layout=ConstrainedLayoutEngine(wspace=0.05))
    erasure, preserved, inside = figure.subplots(1, 3)
    _draw_erasure(erasure, report)
    _draw_drift(preserved, report)
    _draw_localization(inside, report)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    replace_file(path, content.getvalue())


def _draw_erasure(axes: Axes, report: Report) -> None:
    of_concept = "" if report["concept"] is None else f" of “{report['concept']}”"
    _panel(axes, report, "erasure_coefficient", _ERASED, f"erasure coefficient{of_concept}", ".2f")
    axes.axhline(1, color=_REFERENCE, linestyle="--", linewidth=1)
    axes.axhline(0, color=_REFERENCE, linewidth=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.15), max(high, 1.15))
    _note(axes, 1, "nothing erased")
    _note(axes, 0, "the concept has no effect")


def _draw_drift(axes: Axes, report: Report) -> None:
    _panel(axes, report, "preserved_drift", _KEPT, "drift on kept prompts", ".4f")
    axes.set_ylim(bottom=0)
    if report["frozen_drift"]:
        axes.axhline(report["frozen_drift"], color=_REFERENCE, linestyle="--", linewidth=1)
        _note(axes, report["frozen_drift"], "rounding")


def _draw_localization(axes: Axes, report: Report) -> None:
    _panel(axes, report, "localization", _INSIDE, "share of the change inside the mask", ".0%")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    share = report["mask_share"]
    if share is not None:
        axes.axhspan(share["least"], share["most"], color=_REFERENCE, alpha=0.15, linewidth=0)
        axes.axhline(share["mean"], color=_REFERENCE, linestyle="--", linewidth=1)
        _note(axes, share["mean"], f"mask: {share['mean']:.0%} of the tokens")


def _panel(axes: Axes, report: Report, name: str, colour: str, title: str, form: str) -> None:
    """One metric: a dot per timestep, and a line through the ranges of timesteps."""
    dots = [(row["from"], row[name]) for row in report["by_timestep"] if row[name] is not None]
    line = [((row["from"] + row["to"]) / 2, row[name]) for row in report["by_timesteps"] if row[name] is not None]
    total = report[name]
    axes.set_title(title if total is None else f"{title}: {total:{form}}", fontsize=12)
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
        axes.plot(*zip(*line, strict=True), "-", color=colour, linewidth=2)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color="0.6", transform=axes.transAxes)
    boundary = report["cache"]["boundary"]
    if boundary is not None:
        axes.axvline(boundary, color=_REFERENCE, linestyle=":", linewidth=1)
    axes.set_xlim(1000, 0)
    axes.set_xlabel("timestep" if boundary is None else "timestep (dotted: where the second transformer takes over)")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _note(axes: Axes, y: float, text: str) -> None:
    note = axes.annotate(text, (0, y), xytext=(-2, 4), textcoords="offset points", ha="right", color="0.4", fontsize=9)
    note.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
