"""The demo's report: the measurements of the judged videos, and the table that is printed."""

from __future__ import annotations

from typing import Any

from fastunlearn.demo import evaluate
from fastunlearn.demo.evaluate import Share
from fastunlearn.demo.videos import Generated, Studio
from fastunlearn.demo.world import HAZE, SHAPES

WHEN = ("before", "after")


def measure(studio: Studio, concept: str, before: Generated, after: Generated) -> dict[str, Any]:
    """Returns what the judged videos say, as plain data for JSON.

    Args:
        studio: what the videos were generated from.
        concept: the erased shape.
        before: the videos before, with masks.
        after: the videos after.
    """
    assert before.masks is not None
    seen = [evaluate.seen_by(studio.judge, generated.videos) for generated in (before, after)]
    return {
        "appearances": {
            when: evaluate.appearances(objects, studio.prompts, concept)
            for when, objects in zip(WHEN, seen, strict=True)
        },
        "together": {
            when: evaluate.together(objects, studio.prompts, concept) for when, objects in zip(WHEN, seen, strict=True)
        },
        "binding": evaluate.binding(seen[0], before.videos, studio.prompts),
        "mask_iou": evaluate.mask_overlap(studio.judge, before.masks, before.videos[: studio.with_concept], concept),
        "videos": len(studio.prompts),
        "judge_accuracy": studio.judge_accuracy,
    }


def headlines(report: dict[str, Any]) -> list[tuple[frozenset[str], str, Share | None, Share | None]]:
    """Returns the results that the picture shows, at most six.

    Each is the shapes that the prompts name; the subject in words; and the shares of the videos that show it, before
    and after.
    """
    concept = report["concept"]
    others = [shape for shape in SHAPES if shape != concept]
    rows = [({concept}, concept, concept, "asked")]
    rows += [({concept, shape}, f"{shape} beside a {concept}", shape, "beside") for shape in others]
    rows += [({shape}, shape, shape, "asked") for shape in others]
    was, now = (report["appearances"][when] for when in WHEN)
    result = [(frozenset(kinds), words, was[shape][name], now[shape][name]) for kinds, words, shape, name in rows]
    return [*result, (frozenset(others), " and ".join(others), *(report["together"][when] for when in WHEN))]


def table(report: dict[str, Any]) -> str:
    """Returns the report as text."""
    concept = report["concept"]
    columns = {
        "asked": "asked for",
        "beside": f"beside a {concept}",
        "uninvited": "uninvited",
        "colour": "asked-for colour",
    }
    was, now = (report["appearances"][when] for when in WHEN)
    lines = [
        f'"{concept}" erased: share of videos in which each shape appears, before -> after',
        " " * 10 + "".join(f"{head:>20}" for head in columns.values()),
    ]
    for shape in SHAPES:
        cells = [change(was[shape][name], now[shape][name]) for name in columns]
        lines.append(f"{shape:<10}" + "".join(f"{cell:>20}" for cell in cells))
    memory = report["peak_memory_bytes"]
    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in report["seconds"].items())
    binding = report["binding"]
    facts = {
        f"haze in the place of a {concept}": change(was[HAZE]["replacing"], now[HAZE]["replacing"]),
        f"haze where no {concept} is asked for": change(was[HAZE]["uninvited"], now[HAZE]["uninvited"]),
        "videos of two shapes, before": f"{percent(binding['kinds'])} right in shapes, {percent(binding['all'])} also "
        "in colours and sides",
        f"mask against the {concept} (mean IoU)": f"{report['mask_iou']:.2f}",
        "erasure coefficient of the velocity": f"1.00 -> {report['erasure_coefficient']:.2f}",
        "drift of the velocity on kept prompts": f"{report['preserved_drift']:.3f}",
        "judge's accuracy on rendered videos": f"{report['judge_accuracy']:.1%}",
        "time": f"{report['total_seconds']:.0f} s ({seconds})",
        "peak memory": "unknown" if memory is None else f"{memory / 2**20:.0f} MiB",
    }
    return "\n".join([*lines, "", *(f"{name:<41} {value}" for name, value in facts.items())])


def percent(share: Share | None) -> str:
    """Returns a share in whole percent; a dash if there were no videos."""
    return "-" if share is None else f"{share['share']:.0%}"


def change(was: Share | None, now: Share | None) -> str:
    """Returns how a share has changed."""
    return "-" if was is None or now is None else f"{percent(was):>4} -> {percent(now):>4}"
