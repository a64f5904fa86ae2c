"""The demo's synthetic world: short videos of one or two coloured objects that move in straight lines.

An object is a shape or, where the prompt names a colour alone, a haze: a soft patch of that colour. So a prompt still
means something without the word for a shape: "red circle and blue square" becomes "red and blue square", as "a nude
person" becomes "a person". Of two objects, the first in the prompt is on the left.

Every video comes with its prompt and with the exact region of every object, so that a program can judge what a model
generates and where a mask falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
HAZE = "haze"  # the kind of an object without a shape; no prompt has this word
KINDS = (*SHAPES, HAZE)
COLOURS = {"red": (0.92, 0.26, 0.24), "green": (0.30, 0.78, 0.36), "blue": (0.26, 0.48, 0.95)}
BACKGROUND = (0.08, 0.09, 0.13)

FRAMES, HEIGHT, WIDTH = 3, 16, 24
SMALLEST, LARGEST = 4.0, 5.0  # half the size of an object, in pixels
FRAME_HOLE = 0.5  # the hole of a square, as a fraction of its size
HAZE_WIDTH, HAZE_HEIGHT = 1.1, 0.6  # where a haze has faded to 1 / e, as fractions of its size
MAX_OBJECTS = 2


@dataclass(frozen=True)
class Noun:
    """One object of a prompt, such as "red circle", or "red" for a red haze."""

    kind: str
    colour: str

    def __str__(self) -> str:
        return self.colour if self.kind == HAZE else f"{self.colour} {self.kind}"


Nouns = tuple[Noun, ...]  # the objects that a prompt names, in its order


def prompt_of(nouns: Nouns) -> str:
    """Returns the prompt for `nouns`; without nouns that is the empty prompt, which asks for no particular object."""
    return " and ".join(map(str, nouns))


@dataclass(frozen=True)
class Videos:
    """A batch of rendered videos.

    Attributes:
        pixels: (B, F, 3, H, W) float32 in [-1, 1].
        nouns: the objects that each video shows, in the order of its prompt, which is from left to right.
        coverage: (B, 2, F, H, W) in [0, 1], the share of each pixel that an object covers; zero if there is no second
            object.
    """

    pixels: Tensor
    nouns: list[Nouns]
    coverage: Tensor

    @property
    def prompts(self) -> list[str]:
        """The prompt of each video."""
        return [prompt_of(nouns) for nouns in self.nouns]

    @property
    def present(self) -> Tensor:
        """(B, kinds, colours) bool: whether each video shows each kind of object in each colour."""
        return presence(self.nouns)


def presence(prompts: Sequence[Nouns]) -> Tensor:
    """Returns whether each prompt names each kind of object in each colour: (prompts, kinds, colours) bool."""
    colours = list(COLOURS)
    present = torch.zeros(len(prompts), len(KINDS), len(colours), dtype=torch.bool)
    for row, nouns in enumerate(prompts):
        for noun in nouns:
            present[row, KINDS.index(noun.kind), colours.index(noun.colour)] = True
    return present


def palette() -> Tensor:
    """Returns the colours of the objects, (colours, 3) RGB in [-1, 1], in the order of COLOURS."""
    return torch.tensor(list(COLOURS.values())) * 2 - 1


def background() -> Tensor:
    """Returns the colour of the background, (3,) RGB in [-1, 1]."""
    return torch.tensor(BACKGROUND) * 2 - 1


def _coverage(dx: Tensor, dy: Tensor, size: Tensor) -> Tensor:
    """Returns the share of each pixel that an object of each kind covers, (..., kinds), by offset from its centre.

    The shapes are a disc, the frame of a square and an upright triangle. The square has a hole because shapes of so few
    pixels are hard to tell apart by their outlines alone. The haze is wide, low and soft.
    """
    circle = torch.hypot(dx, dy) - size
    chebyshev = torch.maximum(dx.abs(), dy.abs())
    square = torch.maximum(chebyshev - size, FRAME_HOLE * size - chebyshev)
    base = dy - size
    sides = (2 * dx.abs() - (dy + size)) / math.sqrt(5)  # their normals are (2, -1) and (-2, -1)
    signed_distances = torch.stack([circle, square, torch.maximum(base, sides)], dim=-1)  # pixels, negative inside
    haze = torch.exp(-(dx / (HAZE_WIDTH * size)).square() - (dy / (HAZE_HEIGHT * size)).square())
    return torch.cat([(0.5 - signed_distances).clamp(0, 1), haze[..., None]], dim=-1)


def sample_videos(count: int, generator: torch.Generator, *, two_objects: float = 0.45) -> Videos:
    """Draws `count` videos. Each shows two objects, of different kinds and colours, with probability `two_objects`."""

    def uniform(low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    colours = list(COLOURS)
    both = torch.rand(count, generator=generator) < two_objects
    kind = torch.rand(count, len(KINDS), generator=generator).argsort(dim=1)[:, :MAX_OBJECTS]
    colour = torch.rand(count, len(colours), generator=generator).argsort(dim=1)[:, :MAX_OBJECTS]
    size = uniform(SMALLEST, LARGEST, count, MAX_OBJECTS)

    # Two objects have one half of the width each: the left half for the first in the prompt.
    is_left = torch.tensor([True, False])
    x_low = torch.where(both[:, None] & ~is_left, WIDTH / 2, 0.0)
    x_high = torch.where(both[:, None] & is_left, WIDTH / 2, float(WIDTH))
    start_x = uniform(x_low + size, x_high - size, count, MAX_OBJECTS)
    end_x = uniform(x_low + size, x_high - size, count, MAX_OBJECTS)
    start_y = uniform(size, HEIGHT - size, count, MAX_OBJECTS)
    end_y = uniform(size, HEIGHT - size, count, MAX_OBJECTS)

    time = torch.linspace(0, 1, FRAMES)
    x = start_x[..., None] + (end_x - start_x)[..., None] * time  # (B, 2, F)
    y = start_y[..., None] + (end_y - start_y)[..., None] * time
    rows = torch.arange(HEIGHT) + 0.5
    columns = torch.arange(WIDTH) + 0.5
    dx = (columns - x[..., None, None]).expand(-1, -1, -1, HEIGHT, -1)
    dy = (rows[:, None] - y[..., None, None]).expand(-1, -1, -1, -1, WIDTH)
    by_kind = _coverage(dx, dy, size[..., None, None, None])
    which = kind[..., None, None, None, None].expand(*by_kind.shape[:-1], 1)
    coverage = by_kind.gather(-1, which).squeeze(-1)
    coverage[:, 1] *= both[:, None, None, None]

    pixels = background()[:, None, None].expand(count, FRAMES, 3, HEIGHT, WIDTH)
    for index in range(MAX_OBJECTS):
        paint = palette()[colour[:, index]][:, None, :, None, None]
        pixels = torch.lerp(pixels, paint.expand_as(pixels), coverage[:, index, :, None].expand_as(pixels))

    nouns = [
        tuple(
            Noun(KINDS[kind[row, index]], colours[int(colour[row, index])])
            for index in range(MAX_OBJECTS if both[row] else 1)
        )
        for row in range(count)
    ]
    return Videos(pixels, nouns, coverage)
