"""Finds an installed font that has the letters of a text, so that no picture shows boxes in their place."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font

# Tried in this order, before any other installed font. DejaVu comes with matplotlib.
_PREFERRED = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "WenQuanYi Zen Hei", "Arial Unicode MS", "Noto Sans"),
)
_BOXES = "Last Resort"  # has a box for every letter there is


@lru_cache(maxsize=64)
def font_for(text: str) -> FontEntry | None:
    """The first font that has all letters of `text`; None if no installed one has."""
    letters = {ord(letter) for letter in text if not letter.isspace() and unicodedata.category(letter) != "Cf"}
    return next((font for font in _fonts() if letters <= _letters(font)), None)


def _fonts() -> Iterator[FontEntry]:
    upright = [font for font in fontManager.ttflist if font.style == "normal" and _BOXES not in font.name]
    upright.sort(key=lambda font: abs(int(font.weight) - 400) if str(font.weight).isdigit() else 0)
    for name in _PREFERRED:
        yield from (font for font in upright if font.name == name)
    yield from (font for font in upright if font.name not in _PREFERRED)


def _letters(font: FontEntry) -> set[int]:
    try:
        return set(FT2Font(font.fname).get_charmap())
    except (RuntimeError, OSError):  # not a font that FreeType reads
        return set()
