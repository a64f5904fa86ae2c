"""Says what differs between the settings of two runs, so that the difference can be seen."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

_MOST, _BEFORE = 80, 20  # characters of a value that are shown, and those among them before the first difference


def changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """One line per JSON value that differs, named as precisely as its place allows: "name: old -> new"."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and any(isinstance(x, dict | list) for x in old + new):
        if len(old) != len(new):
            yield f"{name}: {len(old)} entries -> {len(new)} entries"
            return
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from changes(before, now, f"{name}[{index}]")
    else:
        yield f"{name}: " + " -> ".join(shown_apart(old, new))


def shown_apart(old: Any, new: Any) -> tuple[str, str]:
    """Both values as text, cut so that the first difference is in it, and escaped where they would look the same."""
    texts = repr(old), repr(new)
    if len({unicodedata.normalize("NFKC", text) for text in texts}) == 1:
        texts = ascii(old), ascii(new)
    pairs = enumerate(zip(*texts, strict=False))
    first = next((index for index, (a, b) in pairs if a != b), min(map(len, texts)))
    start = first - _BEFORE if first >= _MOST else 0
    before, now = (_cut(text, start) for text in texts)
    return before, now


def _cut(text: str, start: int) -> str:
    end = start + _MOST
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
