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
from matplotlib.ticker import PercentFormatter

from fastunlearn.files import replace_file
from fastunlearn.training.data.fonts import font_for

Report = Mapping[str, Any]  # what evaluation.json holds

_SEEN, _ERASED, _KEPT, _INSIDE, _REFERENCE = "#b5651d", "#d1495b", "#2e7d6b", "#5b6bbf", "0.55"


def table(report: Report) -> str:
    """The metrics as text: whether the concept is seen, which of all says most about the videos; then the diagnostics.

    These have a row per range of timesteps, from noise to video, then the totals and how to read them.
    """
    heads = ("erasure coefficient", "distance to baseline", "change inside mask", "drift on kept prompts")
    lines = [*_seen_remarks(report["seen"]), "", f"{'timestep':>12}" + "".join(f"{head:>23}" for head in heads)]
    for row in report["by_timesteps"]:
        first, last = f"{row['from']:.0f}", f"{row['to']:.0f}"
        lines.append(_row(first if first == last else f"{first} - {last}", row))
    return "\n".join([*lines, _row("total", report), "", *_remarks(report)])


def _row(name: str, values: Report) -> str:
    cells = (
        _shown(values["erasure_coefficient"], ".2f"),
        _shown(values["distance_to_baseline"], ".2f"),
        _shown(values["localization"], ".0%"),
        _shown(values["preserved_drift"], ".4f"),
    )
    return f"{name:>12}" + "".join(f"{cell:>23}" for cell in cells)


def _remarks(report: Report) -> Iterator[str]:
    """The lines below the table."""
    concept = "the concept" if report["concept"] is None else f'"{report["concept"]}"'
    yield f"{report['target_points']} points with {concept}, {report['kept_points']} without"
    yield "erasure coefficient     1: nothing erased; 0: the concept has no effect; below 0: avoided"
    early = _shown(report["early_erasure_coefficient"], ".2f")
    yield f"  at early timesteps    {early}; what a video shows is decided there"
    yield "distance to baseline    1: nothing erased; 0: the concept has no effect; every other change makes it larger"
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


def _seen_remarks(seen: Report | None) -> Iterator[str]:
    if seen is None:
        yield "concept seen            not measured: no videos were sampled"
        return
    share, videos = seen["share"], seen["videos"]
    yield (
        f"concept seen            in {share['erased']:.0%} of {videos} videos with the erasers, {share['frozen']:.0%} "
        f"without, {share['baseline']:.0%} of the baseline's"
    )
    yield f"mean likeness to it     {_shown(seen['mean_likeness'], '.2f')}; 1: as without erasers; 0: as the baseline's"
    yield f"erasure along them      {_shown(seen['on_policy_coefficient'], '.2f')} is the erasure coefficient there"


def draw(report: Report, path: Path) -> None:
    """Draws the likeness of each video, and erasure, drift and localization over the timesteps from noise to video.

    Args:
        report: the evaluation.
        path: the PNG file to write.
    """
    title_font = font_for(_title(report))
    # Later families stand in where DejaVu lacks a letter.
    families = ["DejaVu Sans", *([] if title_font is None else [title_font.name])]
    with matplotlib.rc_context({"font.family": list(dict.fromkeys(families))}):
        figure = Figure(figsize=(18, 4.8), layout=ConstrainedLayoutEngine(wspace=0.05))
        seen, erasure, preserved, inside = figure.subplots(1, 4, width_ratios=(2, 3, 3, 3))
        _draw_seen(seen, report["seen"])
        _draw_erasure(erasure, report, "erasure coefficient" if title_font is None else _title(report))
        _draw_drift(preserved, report)
        _draw_localization(inside, report)
        content = io.BytesIO()
        figure.savefig(content, dpi=110, format="png")
    replace_file(path, content.getvalue())


def _title(report: Report) -> str:
    """What the first panel shows; its concept may be in any script."""
    return "erasure coefficient" + ("" if report["concept"] is None else f" of “{_short(report['concept'], 24)}”")


def _draw_seen(axes: Axes, seen: Report | None) -> None:
    """The likeness of each video to the concept: a column of dots without erasers, with them, and for the baseline."""
    axes.set_title("concept seen" if seen is None else f"concept seen: {seen['share']['erased']:.0%}", fontsize=12)
    versions = {"frozen": "without\nerasers", "erased": "with\nerasers", "baseline": "baseline\nprompt"}
    likeness = {} if seen is None else seen["likeness"]
    for place, version in enumerate(versions):
        values = sorted(likeness.get(version, ()))
        spread = [place + 0.5 * ((index + 0.5) / len(values) - 0.5) for index in range(len(values))]
        colour = _SEEN if version == "erased" else _REFERENCE
        axes.plot(spread, values, "o", color=colour, alpha=0.6, markersize=5, markeredgewidth=0)
    if seen is None:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color="0.6", transform=axes.transAxes)
    axes.axhline(0.5, color=_REFERENCE, linestyle="--", linewidth=1, label="seen above this line")
    axes.set_xticks(range(len(versions)), versions.values())
    axes.set_xlim(-0.6, len(versions) - 0.4)
    axes.set_xlabel("videos (a dot each)")
    axes.set_ylabel("likeness to the concept")
    axes.grid(alpha=0.2, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes)


def _draw_erasure(axes: Axes, report: Report, title: str) -> None:
    _panel(axes, report, "erasure_coefficient", _ERASED, title, ".2f")
    axes.axhline(1, color=_REFERENCE, linestyle="--", linewidth=1, label="1: nothing erased")
    axes.axhline(0, color=_REFERENCE, linewidth=1, label="0: the concept has no effect")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.15), max(high, 1.15))
    axes.set_ylabel("what is left of the concept's direction")
    _legend(axes)


def _draw_drift(axes: Axes, report: Report) -> None:
    _panel(axes, report, "preserved_drift", _KEPT, "drift on kept prompts", ".4f")
    axes.set_ylim(bottom=0)
    if report["frozen_drift"]:
        label = f"drift by rounding: {report['frozen_drift']:.4f}"
        axes.axhline(report["frozen_drift"], color=_REFERENCE, linestyle="--", linewidth=1, label=label)
    axes.set_ylabel("change of the velocity, relative to its norm")
    _legend(axes)


def _draw_localization(axes: Axes, report: Report) -> None:
    _panel(axes, report, "localization", _INSIDE, "share of the change inside the mask", ".0%")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    share = report["mask_share"]
    if share is not None:
        axes.axhspan(share["least"], share["most"], color=_REFERENCE, alpha=0.15, linewidth=0)
        label = f"mask: {share['mean']:.0%} of the tokens ({share['least']:.0%} to {share['most']:.0%})"
        axes.axhline(share["mean"], color=_REFERENCE, linestyle="--", linewidth=1, label=label)
    axes.set_ylabel("share of the erasers' squared change")
    _legend(axes)


def _panel(axes: Axes, report: Report, name: str, colour: str, title: str, form: str) -> None:
    """One metric: a dot per timestep, and a line through the ranges of timesteps."""
    dots = [(row["from"], row[name]) for row in report["by_timestep"] if row[name] is not None]
    line = [((row["from"] + row["to"]) / 2, row[name]) for row in report["by_timesteps"] if row[name] is not None]
    total = report[name]
    # A concept's dollar signs are no formula.
    axes.set_title(title if total is None else f"{title}: {total:{form}}", fontsize=12, parse_math=False)
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=colour, alpha=0.3, markersize=4, markeredgewidth=0)
        axes.plot(*zip(*line, strict=True), "-", color=colour, linewidth=2)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color="0.6", transform=axes.transAxes)
    boundary = report["cache"]["boundary"]
    if boundary is not None:
        label = "the second transformer takes over"
        axes.axvline(boundary, color=_REFERENCE, linestyle=":", linewidth=1, label=label)
    axes.set_xlim(1000, 0)
    axes.set_xlabel("timestep, from noise to video (a dot each; line: means)")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    """Below the axes, where no curve can run through it."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
