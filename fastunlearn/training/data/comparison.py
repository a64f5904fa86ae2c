"""Shows several videos next to each other: as one video, or as a picture of some of their frames."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastunlearn.files import expand_home, replace_file, shown
from fastunlearn.training.data.fonts import font_for
from fastunlearn.training.data.videos import check_frames, to_bytes

_GAP = 4  # pixels between frames, and between videos
_MARGIN = 14
_TITLE_LINE = 22  # pixels from one line of the title to the next
_CAPTION_LINE = 18  # pixels from one line of a caption to the next
_INK, _PALE_INK, _PAPER, _ALARM = (32, 32, 32), (110, 110, 110), (255, 255, 255), (200, 30, 30)


def side_by_side(videos: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Joins videos (F, 3, H, W) in [0, 1] into one video (F, 3, H', W'), from left to right, each below its label.

    Raises:
        ValueError: the videos differ in size, or the number of labels is not the number of videos.
    """
    _check_same_size(videos, labels)
    labels = _drawable(labels)
    num_frames, _, height, width = videos[0].shape
    font = _font(max(10, min(22, height // 12)), "".join(labels))
    top = round(1.6 * font.size)
    size = (len(videos) * (width + _GAP) - _GAP, top + height)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, label in enumerate(labels):
        draw.text((index * (width + _GAP) + width / 2, top / 2), label, _INK, font, anchor="mm")
    canvas = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
    joined = canvas.repeat(num_frames, 1, 1, 1)
    for index, video in enumerate(videos):
        left = index * (width + _GAP)
        joined[:, :, top:, left : left + width] = video.cpu().float()
    return joined


def write_strip(
    path: str | os.PathLike[str],
    rows: Sequence[Tensor],
    labels: Sequence[str],
    title: str = "",
    frames: int = 6,
    *,
    captions: Sequence[str] = (),
    alarming: Collection[int] = (),
) -> None:
    """Writes a PNG with one row per video: some frames from first to last, so that rows can be compared at a glance.

    Where no installed font has the letters of the labels, the captions or the title, it warns, and shows numbers or
    no title.

    Args:
        path: the file, in an existing folder. An existing file is replaced only when the new one is complete.
        rows: videos of one size, each (F, 3, H, W) in [0, 1].
        labels: the label of each row.
        title: the text above all rows, such as the prompt.
        frames: the number of frames to show of each video, evenly spaced; all of them if it has fewer.
        captions: a text above each row, if any, such as its prompt.
        alarming: the numbers of the rows whose label is in the colour of a warning.

    Raises:
        TypeError, ValueError: an argument is not as described.
        OSError: the file cannot be written.
    """
    _check_same_size(rows, labels)
    labels = _drawable(labels)
    if font_for(title) is None:
        _warn_of_missing_letters("title", title, "nothing is")
        title = ""
    num_frames, _, height, width = rows[0].shape
    chosen = torch.linspace(0, num_frames - 1, min(frames, num_frames)).round().long()
    shown_width, shown_height = shown_size(width, height)
    captions = _drawable(captions) if captions else [""] * len(rows)
    font, title_font, caption_font = (_font(15, "".join(labels)), _font(16, title), _font(14, "".join(captions)))
    left = _MARGIN + round(max(font.getlength(label) for label in labels)) + _MARGIN
    right = left + len(chosen) * (shown_width + _GAP) - _GAP
    lines = _wrapped(title, title_font, right - _MARGIN)
    top = _MARGIN + len(lines) * _TITLE_LINE + (8 if lines else 0)
    wrapped_captions = [_wrapped(caption, caption_font, right - left, most=2) for caption in captions]
    heights = [
        len(caption) * _CAPTION_LINE + shown_height + (2 * _GAP if caption else 0) for caption in wrapped_captions
    ]
    bottom = top + sum(heights) + _GAP * (len(rows) - 1)
    picture = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + _TITLE_LINE * index), line, _INK, title_font)
    resample = Image.Resampling.NEAREST if shown_width > width else Image.Resampling.LANCZOS
    for row, (video, label, caption) in enumerate(zip(rows, labels, wrapped_captions, strict=True)):
        y = top + sum(heights[:row]) + _GAP * row + heights[row] - shown_height
        for index, line in enumerate(reversed(caption), start=1):
            draw.text((left, y - _GAP / 2 - _CAPTION_LINE * index), line, _INK, caption_font)
        ink = _ALARM if row in alarming else _PALE_INK
        draw.text((left - _MARGIN, y + shown_height / 2), label, ink, font, anchor="rm")
        for column, frame in enumerate(to_bytes(video[chosen.to(video.device)])):
            thumbnail = Image.fromarray(frame).resize((shown_width, shown_height), resample)
            picture.paste(thumbnail, (left + column * (shown_width + _GAP), y))
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    replace_file(expand_home(path), content.getvalue())


def _check_same_size(videos: Sequence[Tensor], labels: Sequence[str]) -> None:
    if not videos or len(videos) != len(labels):
        raise ValueError(f"labels: expected one per video, got {len(labels)} for {len(videos)} videos")
    for video, label in zip(videos, labels, strict=True):
        check_frames(f"the video {shown(label)}", video)
        if video.shape != videos[0].shape:
            raise ValueError(
                f"the video {shown(label)}: expected shape {tuple(videos[0].shape)}, as the first video has; got "
                f"{tuple(video.shape)}"
            )


def _drawable(labels: Sequence[str]) -> Sequence[str]:
    """The labels, or their numbers where no installed font has their letters."""
    if font_for("".join(labels)) is not None:
        return labels
    _warn_of_missing_letters("labels", labels, "numbers are")
    return [str(number) for number, _ in enumerate(labels, start=1)]


def _warn_of_missing_letters(name: str, text: object, instead: str) -> None:
    warnings.warn(
        f"{name}: expected letters that an installed font has, got {shown(text)}; {instead} shown in their place. "
        "Install a font that has them, such as Noto Sans CJK",
        stacklevel=4,
    )


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    font = font_for(text) or font_for("")
    assert font is not None  # matplotlib comes with fonts
    return ImageFont.truetype(font.fname, size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, most: int = 3) -> list[str]:
    """Wraps `text` between words, to at most `most` lines of at most `width` pixels. Cuts off what does not fit."""
    lines = [""]
    for piece in re.findall(r"\s*\S+", text):
        if font.getlength((lines[-1] + piece).strip()) > width and lines[-1]:
            lines.append("")
        for letter in piece:  # a word may be longer than a line in a script without spaces
            if font.getlength((lines[-1] + letter).strip()) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(last + " …") > width:
            last = last[:-1].rstrip()
        lines = [*lines[: most - 1], last + " …"]
    return lines


def shown_size(width: int, height: int) -> tuple[int, int]:
    """The size of a frame in a picture: small frames are enlarged by a whole factor, large ones are reduced."""
    if width <= 120:
        return width * (180 // width), height * (180 // width)
    scale = min(1.0, 240 / width)
    return round(width * scale), max(1, round(height * scale))
