"""The demo's picture and its animation: for each kind of prompt a video before, the mask, and the video after."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastunlearn.files import replace_file
from fastunlearn.masks import overlay
from fastunlearn.training.data.videos import to_bytes
from fastunlearn.training.loop.measurements import Measured

MARGIN, GAP, COLUMN_GAP = 28, 4, 22  # pixels: around everything, between frames, between columns
PICTURE_SCALE, ANIMATION_SCALE = 6, 7  # pixels on the page per pixel of a frame
CURVE_HEIGHT = 190
FRAME_MILLISECONDS = 450
# The page is opaque, so that it reads alike on a light and on a dark ground.
PAPER, INK, PALE_INK = "#ffffff", "#1f2328", "#656d76"
ERASED_INK, KEPT_INK = "#b3261e", "#1a7f5a"
COLUMNS = ("before", "mask", "after")


@dataclass(frozen=True)
class Row:
    """One kind of prompt, by an example.

    Attributes:
        subject: what the prompts ask for, such as "square beside a circle".
        result: how many of the videos show it, before and after, such as "100% → 94%".
        count: the number of videos.
        is_erased: whether the result should fall.
        prompt: the prompt of the example.
        before, after: the example, (F, 3, H, W) in [0, 1].
        mask: where the concept is in the first one, (F, h, w); None if the prompt does not have it.
    """

    subject: str
    result: str
    count: int
    is_erased: bool
    prompt: str
    before: Tensor
    mask: Tensor | None
    after: Tensor

    @property
    def caption(self) -> str:
        """What the result is of."""
        return f"of {self.count} videos like “{self.prompt}”"

    def videos(self) -> list[Tensor | None]:
        """The videos of each of COLUMNS."""
        return [self.before, None if self.mask is None else overlay(self.before, self.mask), self.after]


def draw_picture(rows: Sequence[Row], validation: Sequence[Measured], concept: str, path: Path) -> None:
    """Writes a PNG with all frames of every row, and how erasure and drift went on in training.

    Args:
        rows: what to show.
        validation: what `train` has measured at held-out points; without measurements there are no curves.
        concept: the erased concept.
        path: the file, which is written completely or not at all.
    """
    num_frames, _, height, width = rows[0].before.shape
    strip = num_frames * (width * PICTURE_SCALE + GAP) - GAP
    row_height = 34 + height * PICTURE_SCALE + 20
    top = MARGIN + 92
    bottom = top + len(rows) * row_height
    page = _Page(2 * MARGIN + 3 * strip + 2 * COLUMN_GAP, bottom + (CURVE_HEIGHT + MARGIN if validation else 0))
    _draw_title(page, concept)
    lefts = [MARGIN + index * (strip + COLUMN_GAP) for index in range(3)]
    for left, name in zip(lefts, COLUMNS, strict=True):
        page.text((left, top - 32), name, size=17, colour=PALE_INK)
    for index, row in enumerate(rows):
        y = top + index * row_height
        page.headline((MARGIN, y), row)
        page.text((page.width - MARGIN, y + 4), row.caption, size=16, colour=PALE_INK, anchor="ra")
        for left, video in zip(lefts, row.videos(), strict=True):
            if video is None:
                centre = (left + strip / 2, y + 34 + height * PICTURE_SCALE / 2)
                page.text(centre, f"no mask: no “{concept}” in the prompt", size=15, colour=PALE_INK, anchor="mm")
                continue
            for number, frame in enumerate(video):
                page.frame((left + number * (width * PICTURE_SCALE + GAP), y + 34), frame, PICTURE_SCALE)
    if validation:
        with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
            curves = _curves(validation, page.width - 2 * MARGIN, CURVE_HEIGHT)
        page.image.paste(curves, (MARGIN, bottom))
    content = io.BytesIO()
    page.image.save(content, format="PNG", optimize=True)
    replace_file(path, content.getvalue())


def draw_animation(rows: Sequence[Row], concept: str, path: Path) -> None:
    """Writes a GIF of the same rows, one frame at a time: those with a mask on the left, the others on the right.

    The frames run forward and back, because an object that jumps from its last place to its first is hard to follow.
    """
    num_frames, _, height, width = rows[0].before.shape
    width, height = width * ANIMATION_SCALE, height * ANIMATION_SCALE
    blocks = [[row for row in rows if row.mask is not None], [row for row in rows if row.mask is None]]
    used = [[0, 1, 2], [0, 2]]  # of COLUMNS, for each block
    lefts = [MARGIN, MARGIN + 3 * (width + GAP) + 2 * COLUMN_GAP]
    top, row_height = MARGIN + 92, 56 + height + 18
    size = (lefts[1] + 2 * (width + GAP) + MARGIN, top + max(map(len, blocks)) * row_height + MARGIN - 18)
    pages = []
    for number in [*range(num_frames), *range(num_frames - 2, 0, -1)]:
        page = _Page(*size)
        _draw_title(page, concept)
        for left, block, columns in zip(lefts, blocks, used, strict=True):
            for place, column in enumerate(columns):
                page.text((left + place * (width + GAP), top - 28), COLUMNS[column], size=15, colour=PALE_INK)
            for index, row in enumerate(block):
                y = top + index * row_height
                page.headline((left, y), row, size=16)
                page.text((left, y + 26), row.caption, size=14, colour=PALE_INK)
                videos = row.videos()
                for place, column in enumerate(columns):
                    video = videos[column]
                    if video is not None:
                        page.frame((left + place * (width + GAP), y + 56), video[number], ANIMATION_SCALE)
        pages.append(page.image)
    # One palette for all pages: with one each, colours that stand still would flicker.
    palette = pages[0].quantize(256, dither=Image.Dither.NONE)
    first, *rest = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    content = io.BytesIO()
    first.save(
        content,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=FRAME_MILLISECONDS,
        loop=0,
        disposal=1,
        optimize=True,
    )
    replace_file(path, content.getvalue())


class _Page:
    """A sheet to draw on. Positions are the upper left corners, in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self,
        position: tuple[float, float],
        text: str,
        *,
        size: int,
        colour: str = INK,
        bold: bool = False,
        anchor: str = "la",
    ) -> float:
        """Writes one line, and returns its width."""
        font = _font(size, bold)
        self._draw.text(position, text, colour, font, anchor=anchor)
        return font.getlength(text)

    def headline(self, position: tuple[float, float], row: Row, size: int = 20) -> None:
        """Writes a row's subject and, in colour, its result."""
        x, y = position
        x += self.text((x, y), f"{row.subject}  ", size=size, bold=True)
        self.text((x, y), row.result, size=size, bold=True, colour=ERASED_INK if row.is_erased else KEPT_INK)

    def frame(self, position: tuple[int, int], frame: Tensor, scale: int) -> None:
        """Pastes a frame (3, H, W) in [0, 1], enlarged so that its pixels stay sharp."""
        (pixels,) = to_bytes(frame[None])
        image = Image.fromarray(pixels)
        size = (image.width * scale, image.height * scale)
        self.image.paste(image.resize(size, Image.Resampling.NEAREST), position)


@lru_cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), size)  # matplotlib's own


def _draw_title(page: _Page, concept: str) -> None:
    page.text((MARGIN, MARGIN - 6), f"“{concept}” erased from a text-to-video model", size=26, bold=True)
    explanation = "Same prompts and noise. Percentages: videos that show the shape, before → after."
    page.text((MARGIN, MARGIN + 30), explanation, size=15, colour=PALE_INK)


def _curves(validation: Sequence[Measured], width: int, height: int) -> Image.Image:
    """Draws the erasure coefficient and the drift on held-out trajectories against the training step."""
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    curves = {
        "erasure_coefficient": ("how much of the concept is left in the velocity (held-out trajectories)", ERASED_INK),
        "preserved_drift": ("how far the velocity for other prompts has moved (held-out trajectories)", KEPT_INK),
    }
    for axes, (name, (title, colour)) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        values = [getattr(measured, name) for measured in validation]
        axes.plot([measured.step for measured in validation], values, color=colour, linewidth=2)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("training step", fontsize=9, color=PALE_INK)
        axes.tick_params(labelsize=9, colors=PALE_INK)
        axes.axhline(0, color=PALE_INK, linewidth=0.8, alpha=0.5)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return Image.open(content).convert("RGB")
