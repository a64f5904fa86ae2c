"""The prompts of the demo: those it trains erasers with, and those it judges them by.

There are so few prompts that those for one object are in both. Of the prompts for two objects, erasers are trained with
the colours in one order (red and green, green and blue, blue and red) and judged by the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from fastunlearn.demo.world import COLOURS, KINDS, SHAPES, Noun, Nouns, prompt_of
from fastunlearn.files import replace_file

VIDEOS_PER_SHAPE, VIDEOS_PER_PAIR = 12, 16

_ORDER = list(zip(COLOURS, [*list(COLOURS)[1:], *list(COLOURS)[:1]], strict=True))
_OTHER_ORDER = [(second, first) for first, second in _ORDER]


def _one(kind: str) -> list[Nouns]:
    return [(Noun(kind, colour),) for colour in COLOURS]


def _two(kinds: Sequence[str], colours: Sequence[tuple[str, str]]) -> list[Nouns]:
    """The prompts for two kinds of objects: each of them may be the first."""
    orders = itertools.product(colours, itertools.permutations(kinds))
    return [tuple(map(Noun, kinds, colours)) for colours, kinds in orders]


def training_files(concept: str) -> dict[str, list[Nouns]]:
    """Returns the prompts of each file that `prepare` reads, by the file's name.

    Those of target.txt have the concept, alone or beside another shape. Those of kept.txt are for all other objects and
    pairs of objects.
    """
    target = _one(concept)
    target += [nouns for other in SHAPES if other != concept for nouns in _two((concept, other), _ORDER)]
    others = [kind for kind in KINDS if kind != concept]
    kept = [nouns for kind in others for nouns in _one(kind)]
    kept += [nouns for pair in itertools.combinations(others, 2) for nouns in _two(pair, _ORDER)]
    return {"target.txt": target, "kept.txt": kept}


def held_out_files(concept: str) -> dict[str, list[Nouns]]:
    """Returns the prompts of each file that `evaluate` reads, by its name: none that erasers are trained with."""
    pairs = list(itertools.combinations(SHAPES, 2))
    return {
        f"{name}-held-out.txt": [
            nouns for pair in pairs if (concept in pair) == has_concept for nouns in _two(pair, _OTHER_ORDER)
        ]
        for name, has_concept in (("target", True), ("kept", False))
    }


def judged(concept: str) -> list[Nouns]:
    """Returns the prompts of the videos that the judge sees: for every shape alone, and for every pair of shapes.

    Those with the concept come first; prompts are repeated, for videos from other noise.
    """
    sets = [(_one(shape), VIDEOS_PER_SHAPE) for shape in SHAPES]
    sets += [(_two(pair, _OTHER_ORDER), VIDEOS_PER_PAIR) for pair in itertools.combinations(SHAPES, 2)]
    prompts = [nouns for distinct, count in sets for nouns in itertools.islice(itertools.cycle(distinct), count)]
    return sorted(prompts, key=lambda nouns: concept not in kinds_in(nouns))


def kinds_in(nouns: Nouns) -> frozenset[str]:
    """Returns the kinds of objects that a prompt names."""
    return frozenset(noun.kind for noun in nouns)


def write_files(folder: Path, concept: str) -> None:
    """Writes the files for `prepare` and `evaluate` as a user would, one prompt per line."""
    for name, prompts in (training_files(concept) | held_out_files(concept)).items():
        replace_file(folder / name, "".join(f"{prompt_of(nouns)}\n" for nouns in prompts).encode())
