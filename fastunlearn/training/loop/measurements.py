"""The measurements of a training run: smoothed, summed up in a line, and as the file `validation.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastunlearn.files import read_versioned_json, shown, write_json

VALIDATION = "validation.json"
FORMAT, FORMAT_VERSION = "fastunlearn-validation", 1
_NEWEST = 0.5  # the weight of the newest measurement in the smoothed one


class Measured(NamedTuple):
    """The metrics at held-out points after some steps; None where there are no such points."""

    step: int
    erasure_coefficient: float | None
    preserved_drift: float | None


def metrics(measurements: Sequence[Measured]) -> list[dict[str, float]]:
    """The metrics of each measurement by name, as measured and "smoothed_": averaged with those before it.

    What was not measured is left out.
    """
    rows: list[dict[str, float]] = []
    for measured in measurements:
        raw = {name: value for name, value in measured._asdict().items() if name != "step" and value is not None}
        before = rows[-1] if rows else {}
        smoothed = {
            f"smoothed_{name}": _NEWEST * value + (1 - _NEWEST) * before.get(f"smoothed_{name}", value)
            for name, value in raw.items()
        }
        rows.append(raw | smoothed)
    return rows


def summary(measurements: Sequence[Measured]) -> str:
    """What changed from the first of one or more measurements to the last, in one line."""
    first, last = measurements[0], measurements[-1]
    parts = []
    if first.erasure_coefficient is not None and last.erasure_coefficient is not None:
        parts.append(
            f"erasure coefficient {first.erasure_coefficient:.2f} -> {last.erasure_coefficient:.2f} "
            "(1: nothing is erased, 0: as without the concept)"
        )
    if last.preserved_drift is not None:
        parts.append(f"drift at kept prompts {last.preserved_drift:.3f} (0: none)")
    return f"held-out points after {last.step} steps: {', '.join(parts) or 'nothing to measure'}"


def write(folder: Path, measurements: Sequence[Measured], target_points: int, kept_points: int) -> None:
    """Writes `validation.json`: the measurements, and at how many points they were made."""
    write_json(
        folder / VALIDATION,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "target_points": target_points,
            "kept_points": kept_points,
            "measurements": [
                measured._asdict() | row for measured, row in zip(measurements, metrics(measurements), strict=True)
            ],
        },
    )


def read(folder: Path) -> list[Measured]:
    """Reads the measurements of a run; none if its folder has no `validation.json`.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / VALIDATION
    if not path.exists():
        return []
    content = read_versioned_json(
        path, format=FORMAT, version=FORMAT_VERSION, what="the measurements of a training run", allow_nan=False
    )
    entries = content.get("measurements")
    measurements: list[Measured] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        values: list[Any] = [entry.get(name) for name in Measured._fields] if isinstance(entry, dict) else [None] * 3
        measured = Measured(*values)
        least = measurements[-1].step + 1 if measurements else 0
        if type(measured.step) is not int or measured.step < least or not all(map(_is_metric, measured[1:])):
            raise ValueError(
                f"{path}: expected measurements at ascending steps, got {shown(entry)}; the file is damaged: delete it "
                "to go on without the earlier measurements"
            )
        measurements.append(measured)
    return measurements


def _is_metric(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e30)
