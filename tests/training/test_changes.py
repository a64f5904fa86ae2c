from __future__ import annotations

from typing import Any

import pytest

from fastunlearn.training.cache.changes import changes, shown_apart

LONG = "a person " * 30


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (1, 2, ("1", "2")),
        ("circle", None, ("'circle'", "None")),
        (
            LONG + "in red",
            LONG + "in blue",
            ("... person a person in red'", "... person a person in blue'"),
        ),
        (LONG, LONG + "!", ("...n a person a person '", "...n a person a person !'")),
        ("caf\u00e9", "cafe\u0301", ("'caf\\xe9'", "'cafe\\u0301'")),  # they look the same
        ("\uff41 dog", "a dog", ("'\\uff41 dog'", "'a dog'")),
        ("\u5706", "\u65b9", ("'\u5706'", "'\u65b9'")),  # they do not
        ("x" * 100, "y" * 100, ("'" + "x" * 79 + "...", "'" + "y" * 79 + "...")),
    ],
)
def test_two_values_are_shown_where_they_differ(old: Any, new: Any, expected: tuple[str, str]) -> None:
    shown = shown_apart(old, new)
    assert shown[0] != shown[1]
    assert all(len(text) <= 86 for text in shown)
    assert shown == expected


def test_changes_are_named_by_their_place() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": [{"e": LONG + "x"}, {}]}, "gone": True}
    new = {"a": 1, "b": {"c": [1, 3], "d": [{"e": LONG + "y"}, {}]}, "new": [{}]}
    assert list(changes(old, new)) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d[0].e: ...n a person a person x' -> ...n a person a person y'",
        "gone: True -> None",
        "new: None -> [{}]",
    ]
    assert list(changes({"d": [{}]}, {"d": [{}, {}]})) == ["d: 1 entries -> 2 entries"]
    assert list(changes(old, old)) == []
