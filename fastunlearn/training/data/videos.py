"""Reads and writes video files, and writes pictures that compare the frames of several videos."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from fastunlearn.files import replace_file

FORMATS = ("mp4", "gif")

# H.264 with the colour matrix that players assume for high definition; the file names it as well.
_MP4 = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "iec61966-2-1"),
    *("-movflags", "+faststart", "-f", "mp4"),
)
# One palette for all frames and ordered dithering, so that still areas do not flicker.
_GIF = (
    *("-filter_complex", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=bayer:bayer_scale=3"),
    *("-loop", "0", "-f", "gif"),
)

_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "WenQuanYi Zen Hei", "Arial Unicode MS"),
)
_GAP = 4  # pixels between frames and between videos
_MARGIN = 14
_INK, _PALE_INK, _PAPER = (32, 32, 32), (110, 110, 110), (255, 255, 255)


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """Reads all frames of a video file: (F, 3, H, W) float32 in [0, 1], on the CPU.

    Reads gif and every format that ffmpeg reads. Sound is ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a readable video.
        OSError: ffmpeg is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a video file, but there is no such file")
    frames = _read_gif(path) if path.suffix.lower() == ".gif" else _read_with_ffmpeg(path)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(255)


def write_video(path: str | os.PathLike[str], frames: Tensor, fps: float) -> None:
    """Writes frames to an .mp4 or .gif file. An existing file is replaced only when the new one is complete.

    The H.264 encoding of .mp4 needs even sizes: the last row or column of an odd size is repeated.

    Args:
        path: the file, in an existing folder. Its suffix chooses the format.
        frames: (F, 3, H, W) floating point; clamped to [0, 1].
        fps: frames per second.

    Raises:
        TypeError, ValueError: an argument is not as described.
        OSError: the file cannot be written, or ffmpeg is not installed.
    """
    path = Path(path)
    _check_frames("frames", frames)
    if not fps > 0:
        raise ValueError(f"fps: expected a positive number, got {fps!r}")
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"path: expected a name that ends in .mp4 or .gif, got {path.name!r}")
    if path.suffix == ".mp4":
        frames = F.pad(frames, (0, frames.shape[3] % 2, 0, frames.shape[2] % 2), mode="replicate")
    pixels = _pixels(frames)
    _, height, width, _ = pixels.shape
    rate = str(Fraction(fps).limit_denominator(1001))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    with tempfile.TemporaryDirectory() as folder:
        encoded = Path(folder, "video")
        encoding = _MP4 if path.suffix == ".mp4" else _GIF
        process = _ffmpeg([*source, *encoding, str(encoded)], pixels.tobytes())
        if process.returncode:
            raise OSError(f"{path}: cannot be written: {_reason(process)}")
        replace_file(path, encoded.read_bytes())


def side_by_side(videos: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Joins videos (F, 3, H, W) in [0, 1] to one video (F, 3, H', W'), from left to right, each below its label.

    Raises:
        ValueError: the videos differ in size, or the number of labels is not the number of videos.
    """
    _check_same_size(videos, labels)
    count, _, height, width = videos[0].shape
    font = _font(max(10, min(22, height // 12)), "".join(labels))
    top = round(1.6 * font.size)
    size = (len(videos) * (width + _GAP) - _GAP, top + height)
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, label in enumerate(labels):
        draw.text((index * (width + _GAP) + width / 2, top / 2), label, _INK, font, anchor="mm")
    canvas = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
    joined = canvas.repeat(count, 1, 1, 1)
    for index, video in enumerate(videos):
        left = index * (width + _GAP)
        joined[:, :, top:, left : left + width] = video.cpu().float()
    return joined


def write_strip(
    path: str | os.PathLike[str], rows: Sequence[Tensor], labels: Sequence[str], title: str = "", frames: int = 6
) -> None:
    """Writes a PNG with one row per video: some frames from first to last, so that rows can be compared at a glance.

    Args:
        path: the file, in an existing folder. An existing file is replaced only when the new one is complete.
        rows: videos of one size, each (F, 3, H, W) in [0, 1].
        labels: the label of each row.
        title: the text above all rows, such as the prompt.
        frames: the number of frames to show of each video, evenly spaced; all of them if it has fewer.

    Raises:
        TypeError, ValueError: an argument is not as described.
        OSError: the file cannot be written.
    """
    _check_same_size(rows, labels)
    count, _, height, width = rows[0].shape
    chosen = torch.linspace(0, count - 1, min(frames, count)).round().long()
    shown_width, shown_height = _shown_size(width, height)
    font, title_font = _font(15, "".join(labels)), _font(16, title)
    left = _MARGIN + round(max(font.getlength(label) for label in labels)) + _MARGIN
    right = left + len(chosen) * (shown_width + _GAP) - _GAP
    lines = _wrapped(title, title_font, right - _MARGIN)
    top = _MARGIN + len(lines) * 22 + (8 if lines else 0)
    bottom = top + len(rows) * (shown_height + _GAP) - _GAP
    picture = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 22 * index), line, _INK, title_font)
    resample = Image.Resampling.NEAREST if shown_width > width else Image.Resampling.LANCZOS
    for row, (video, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + row * (shown_height + _GAP)
        draw.text((left - _MARGIN, y + shown_height / 2), label, _PALE_INK, font, anchor="rm")
        for column, frame in enumerate(_pixels(video[chosen.to(video.device)])):
            thumbnail = Image.fromarray(frame).resize((shown_width, shown_height), resample)
            picture.paste(thumbnail, (left + column * (shown_width + _GAP), y))
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    replace_file(Path(path), content.getvalue())


def _check_frames(name: str, frames: object) -> None:
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if frames.dim() != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name}: expected shape (F, 3, H, W) without a zero, got {tuple(frames.shape)}")


def _check_same_size(videos: Sequence[Tensor], labels: Sequence[str]) -> None:
    if not videos or len(videos) != len(labels):
        raise ValueError(f"labels: expected one per video, got {len(labels)} for {len(videos)} videos")
    for video, label in zip(videos, labels, strict=True):
        _check_frames(f"the video {label!r}", video)
        if video.shape != videos[0].shape:
            raise ValueError(
                f"the video {label!r}: expected shape {tuple(videos[0].shape)}, as the first video has; got "
                f"{tuple(video.shape)}"
            )


def _pixels(frames: Tensor) -> np.ndarray:
    """Converts (F, 3, H, W) in [0, 1] to (F, H, W, 3) bytes. NaN becomes black."""
    clamped = frames.detach().cpu().float().nan_to_num(0.0).clamp(0, 1)
    return clamped.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _read_gif(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            frames = []
            for index in range(getattr(file, "n_frames", 1)):
                file.seek(index)
                frames.append(np.asarray(file.convert("RGB")))
    except (UnidentifiedImageError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected a gif, got a file that cannot be read as one ({error})") from error
    return np.stack(frames)


def _read_with_ffmpeg(path: Path) -> np.ndarray:
    # Portable pixmaps have the frames' size in their header, and ffmpeg has rotated the frames as the file says.
    decode = ["-an", "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
    process = _ffmpeg(["-i", f"file:{path}", *decode])
    if process.returncode or not process.stdout:
        raise ValueError(f"{path}: expected a video, got a file that cannot be read as one ({_reason(process)})")
    header, size, depth, _ = process.stdout.split(b"\n", 3)
    width, height = map(int, size.split())
    header_bytes = len(header) + len(size) + len(depth) + 3
    images = np.frombuffer(process.stdout, np.uint8).reshape(-1, header_bytes + height * width * 3)
    return images[:, header_bytes:].reshape(-1, height, width, 3).copy()


def _ffmpeg(arguments: Sequence[str], data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    # Not through imageio, which does not notice when ffmpeg fails, for example on a full disk.
    command = [program, "-v", "error", *arguments]
    return subprocess.run(command, input=data if data is not None else b"", capture_output=True, check=False)


def _reason(process: subprocess.CompletedProcess[bytes]) -> str:
    """Why ffmpeg failed: the last line that it printed."""
    lines = process.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ffmpeg ended with exit status {process.returncode} and no frames"


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """The first of `_FONTS` that has all letters of `text`; if none has, DejaVu, which comes with matplotlib."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    letters = {ord(letter) for letter in text if not letter.isspace()}
    for family in _FONTS:
        try:
            file = findfont(family, fallback_to_default=False)
        except ValueError:
            continue
        if letters <= FT2Font(file).get_charmap().keys():
            return ImageFont.truetype(file, size)
    return ImageFont.truetype(findfont(_FONTS[0]), size)


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


def _shown_size(width: int, height: int) -> tuple[int, int]:
    """The size of a frame in a picture: small frames are enlarged by a whole factor, large ones are reduced."""
    if width <= 120:
        return width * (180 // width), height * (180 // width)
    scale = min(1.0, 240 / width)
    return round(width * scale), max(1, round(height * scale))
