"""Video files to tensors and back, and pictures of videos' frames."""

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

# H.264 in the colours that players take for granted in high definition; the matrix is written into the file too.
_MP4 = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "iec61966-2-1"),
    *("-movflags", "+faststart", "-f", "mp4"),
)
# One palette for all frames and an ordered pattern, so that what stands still does not flicker.
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
    """Every frame of a video file: (F, 3, H, W) float32 in [0, 1], on the CPU.

    Reads gif, and whatever ffmpeg knows. Sound is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no video that can be read.
        OSError: there is no ffmpeg.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    frames = _read_gif(path) if path.suffix.lower() == ".gif" else _read_with_ffmpeg(path)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(255)


def write_video(path: str | os.PathLike[str], frames: Tensor, fps: float) -> None:
    """Writes frames as .mp4 or .gif, as `path` ends. What was at `path` stays until the new file is whole.

    H.264 halves the resolution of colours, so that it needs even sizes: an odd one gets its last row or column twice.

    Args:
        path: of the file, in a folder that exists.
        frames: (F, 3, H, W) floating point; clamped to [0, 1].
        fps: frames a second.

    Raises:
        TypeError, ValueError: an argument is not as described.
        OSError: the file cannot be written, or there is no ffmpeg.
    """
    path = Path(path)
    _check_frames("frames", frames)
    if not fps > 0:
        raise ValueError(f"fps: expected a positive number, got {fps!r}")
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"path: expected the ending .mp4 or .gif, got {path.name!r}")
    if path.suffix == ".mp4":
        frames = F.pad(frames, (0, frames.shape[3] % 2, 0, frames.shape[2] % 2), mode="replicate")
    pixels = _pixels(frames)
    _, height, width, _ = pixels.shape
    rate = str(Fraction(fps).limit_denominator(1001))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "video")
        encoding = _MP4 if path.suffix == ".mp4" else _GIF
        done = _ffmpeg([*source, *encoding, str(written)], pixels.tobytes())
        if done.returncode:
            raise OSError(f"{path}: cannot be written: {_reason(done)}")
        replace_file(path, written.read_bytes())


def side_by_side(videos: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Several videos, each (F, 3, H, W) in [0, 1], as one, (F, 3, H', W'), each under its label.

    Raises:
        ValueError: the videos are of different sizes, or not as many as labels.
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
    """Writes a PNG of one video a row: frames from first to last, below each other's, so that they compare at a look.

    Args:
        path: of the file, in a folder that exists. What was there stays until the new file is whole.
        rows: videos of one size, each (F, 3, H, W) in [0, 1].
        labels: what each row is.
        title: above all rows, as the prompt.
        frames: how many to show of each video, evenly spaced; fewer where there are fewer.

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
        kind = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
    if frames.dim() != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name}: expected (F, 3, H, W), none of them zero; got {tuple(frames.shape)}")


def _check_same_size(videos: Sequence[Tensor], labels: Sequence[str]) -> None:
    if not videos or len(videos) != len(labels):
        raise ValueError(f"labels: expected one a video; got {len(labels)} for {len(videos)} videos")
    for video, label in zip(videos, labels, strict=True):
        _check_frames(f"the video {label!r}", video)
        if video.shape != videos[0].shape:
            raise ValueError(f"the video {label!r}: {tuple(video.shape)}, but the first is {tuple(videos[0].shape)}")


def _pixels(frames: Tensor) -> np.ndarray:
    """(F, 3, H, W) in [0, 1] to (F, H, W, 3) bytes. NaN becomes black."""
    wide = frames.detach().cpu().float().nan_to_num(0.0).clamp(0, 1)
    return wide.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _read_gif(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            frames = []
            for index in range(getattr(file, "n_frames", 1)):
                file.seek(index)
                frames.append(np.asarray(file.convert("RGB")))
    except (UnidentifiedImageError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable gif ({error})") from error
    return np.stack(frames)


def _read_with_ffmpeg(path: Path) -> np.ndarray:
    # A stream of portable pixmaps tells the frames' size by itself, turned upright as the file says.
    decode = ["-an", "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
    done = _ffmpeg(["-i", f"file:{path}", *decode])
    if done.returncode or not done.stdout:
        raise ValueError(f"{path}: not a readable video ({_reason(done)})")
    header, size, depth, _ = done.stdout.split(b"\n", 3)
    width, height = map(int, size.split())
    before_pixels = len(header) + len(size) + len(depth) + 3
    images = np.frombuffer(done.stdout, np.uint8).reshape(-1, before_pixels + height * width * 3)
    return images[:, before_pixels:].reshape(-1, height, width, 3).copy()


def _ffmpeg(arguments: Sequence[str], data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    # Not through imageio: it overlooks that ffmpeg failed, on a full disk for example.
    command = [program, "-v", "error", *arguments]
    return subprocess.run(command, input=data if data is not None else b"", capture_output=True, check=False)


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ffmpeg ended with {done.returncode} and no frames"


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """The first of the fonts that has all letters of `text`; DejaVu, which is always there, if none has."""
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
    """`text` in lines of at most `width` pixels, broken between words; what `most` lines do not hold is left out."""
    lines = [""]
    for piece in re.findall(r"\s*\S+", text):
        if font.getlength((lines[-1] + piece).strip()) > width and lines[-1]:
            lines.append("")
        for letter in piece:  # of scripts without spaces a line may be one word
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
    """A frame's size in a strip: small ones blown up by a whole number, large ones brought down."""
    if width <= 120:
        return width * (180 // width), height * (180 // width)
    scale = min(1.0, 240 / width)
    return round(width * scale), max(1, round(height * scale))
