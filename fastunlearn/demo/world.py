"""The demo's synthetic world: short videos of one or two coloured shapes that move in straight lines.

Every video comes with its prompt ("red circle and blue square") and with the exact region of every object, so that
a program can judge what a model generates and where a mask falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (0.92, 0.26, 0.24), "green": (0.30, 0.78, 0.36), "blue": (0.26, 0.48, 0.95)}
BACKGROUND = (0.08, 0.09, 0.13)

FRAMES, HEIGHT, WIDTH = 3, 16, 24
SMALLEST, LARGEST = 4.0, 5.0  # half the size of an object, in pixels
FRAME_HOLE = 0.5  # the hole of a square, as a fraction of its size
MAX_OBJECTS = 2


@dataclass(frozen=True)
class Noun:
    """One object of a prompt, such as "red circle"."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


Nouns = tuple[Noun, ...]  # the objects that a prompt names, in its order


def prompt_of(nouns: Nouns) -> str:
    """Returns the prompt for `nouns`; without nouns that is the empty prompt, which asks for no particular shape."""
    return " and ".join(map(str, nouns))


@dataclass(frozen=True)
class Videos:
    """A batch of rendered videos.

    Attributes:
        pixels: (B, F, 3, H, W) float32 in [-1, 1].
        nouns: the objects that each video shows, in the order of its prompt.
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
        """(B, shapes, colours) bool: whether each video shows each shape in each colour."""
        colours = list(COLOURS)
        present = torch.zeros(len(self.nouns), len(SHAPES), len(colours), dtype=torch.bool)
        for row, nouns in enumerate(self.nouns):
            for noun in nouns:
                present[row, SHAPES.index(noun.shape), colours.index(noun.colour)] = True
        return present


def palette() -> Tensor:
    """Returns the colours of the objects, (colours, 3) RGB in [-1, 1], in the order of COLOURS."""
    return torch.tensor(list(COLOURS.values())) * 2 - 1


def background() -> Tensor:
    """Returns the colour of the background, (3,) RGB in [-1, 1]."""
    return torch.tensor(BACKGROUND) * 2 - 1


def _distance(dx: Tensor, dy: Tensor, size: Tensor) -> Tensor:
    """Returns the signed distance in pixels to the outline of every shape, (..., shapes), negative inside.

    The shapes are a disc, the frame of a square and an upright triangle. The square has a hole because shapes of so few
    pixels are hard to tell apart by their outlines alone.
    """
    circle = torch.hypot(dx, dy) - size
    chebyshev = torch.maximum(dx.abs(), dy.abs())
    square = torch.maximum(chebyshev - size, FRAME_HOLE * size - chebyshev)
    base = dy - size
    sides = (2 * dx.abs() - (dy + size)) / math.sqrt(5)  # their normals are (2, -1) and (-2, -1)
    return torch.stack([circle, square, torch.maximum(base, sides)], dim=-1)


def sample_videos(count: int, generator: torch.Generator, *, two_objects: float = 0.6) -> Videos:
    """Draws `count` videos. Each shows two objects, of different shapes and colours, with probability `two_objects`."""

    def uniform(low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    colours = list(COLOURS)
    both = torch.rand(count, generator=generator) < two_objects
    shape = torch.rand(count, len(SHAPES), generator=generator).argsort(dim=1)[:, :MAX_OBJECTS]
    colour = torch.rand(count, len(colours), generator=generator).argsort(dim=1)[:, :MAX_OBJECTS]
    size = uniform(SMALLEST, LARGEST, count, MAX_OBJECTS)

    # Two objects have one half of the width each. The order in the prompt does not determine the sides.
    first_left = torch.rand(count, generator=generator) < 0.5
    left = torch.stack([first_left, ~first_left], dim=1)
    x_low = torch.where(both[:, None] & ~left, WIDTH / 2, 0.0)
    x_high = torch.where(both[:, None] & left, WIDTH / 2, float(WIDTH))
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
    distance = _distance(dx, dy, size[..., None, None, None])
    which = shape[..., None, None, None, None].expand(*distance.shape[:-1], 1)
    coverage = (0.5 - distance.gather(-1, which).squeeze(-1)).clamp(0, 1)
    coverage[:, 1] *= both[:, None, None, None]

    pixels = background()[:, None, None].expand(count, FRAMES, 3, HEIGHT, WIDTH)
    for index in range(MAX_OBJECTS):
        paint = palette()[colour[:, index]][:, None, :, None, None]
        pixels = torch.lerp(pixels, paint.expand_as(pixels), coverage[:, index, :, None].expand_as(pixels))

    nouns = [
        tuple(
            Noun(SHAPES[shape[row, index]], colours[int(colour[row, index])])
            for index in range(MAX_OBJECTS if both[row] else 1)
        )
        for row in range(count)
    ]
    return Videos(pixels, nouns, coverage)
