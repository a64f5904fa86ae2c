"""Reads and writes video files."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastunlearn.files import check_file, expand_home, replace_file

_LEAST_WIDTH = 192
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


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """Reads all frames of a video file: (F, 3, H, W) float32 in [0, 1], on the CPU.

    Reads gif and every format that ffmpeg reads. Sound is ignored, and transparent parts of a gif are white.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a readable video.
        OSError: ffmpeg is not installed.
    """
    return _to_floats(np.stack(list(_frames(path, None))))


def read_first_frames(path: str | os.PathLike[str], count: int) -> Iterator[Tensor]:
    """Reads the first `count` frames of a video file, or all if it has fewer, without decoding the others.

    Yields:
        One frame at a time: (1, 3, H, W), as `read_video` reads it. Only one is in memory.

    Raises: what `read_video` raises, at the latest after the last frame.
    """
    for frame in _frames(path, count):
        yield _to_floats(frame[None])


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
    path = expand_home(path)
    check_frames("frames", frames)
    if not fps > 0:
        raise ValueError(f"fps: expected a positive number, got {fps!r}")
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"path: expected a name that ends in .mp4 or .gif, got {path.name!r}")
    if path.suffix == ".mp4":
        frames = F.pad(frames, (0, frames.shape[3] % 2, 0, frames.shape[2] % 2), mode="replicate")
    pixels = to_bytes(frames)
    _, height, width, _ = pixels.shape
    rate = str(Fraction(fps).limit_denominator(1001))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    with tempfile.TemporaryDirectory() as folder:
        encoded = Path(folder, "video")
        encoding = _MP4 if path.suffix == ".mp4" else _GIF
        process = _ffmpeg([*source, *encoding, str(encoded)], pixels.tobytes())
        if process.returncode:
            raise OSError(f"{path}: cannot be written: {_reason(process.stderr, process.returncode)}")
        replace_file(path, encoded.read_bytes())


def enlarged(frames: Tensor) -> Tensor:
    """Enlarges frames (F, 3, H, W) by a whole factor, to at least 192 pixels of width, so that a small video is seen.

    Larger frames are returned as they are.
    """
    factor = -(-_LEAST_WIDTH // frames.shape[3])
    return frames.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3) if factor > 1 else frames


def check_ffmpeg(format: str | None = None) -> None:
    """Checks that ffmpeg can be run, and that it can write videos in a format: better now than after hours of work.

    Args:
        format: "mp4" or "gif"; None if videos are only read.

    Raises:
        OSError: ffmpeg is not installed or cannot encode the format.
    """
    process = _ffmpeg(["-version"])
    if process.returncode:
        raise OSError(
            f"ffmpeg: expected a program that can be run, got one that fails "
            f"({_reason(process.stderr, process.returncode)})"
        )
    if format is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                write_video(Path(folder, f"trial.{format}"), torch.zeros(2, 3, 16, 16), 8)
            except OSError as error:
                raise OSError(f"format: expected one that ffmpeg can write, got {format} ({error})") from error


def check_frames(name: str, frames: object) -> None:
    """Raises TypeError or ValueError unless `frames` is a floating-point tensor (F, 3, H, W)."""
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if frames.dim() != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name}: expected shape (F, 3, H, W) without a zero, got {tuple(frames.shape)}")


def to_bytes(frames: Tensor) -> np.ndarray:
    """Converts (F, 3, H, W) in [0, 1] to (F, H, W, 3) bytes. NaN becomes black."""
    clamped = frames.detach().cpu().float().nan_to_num(0.0).clamp(0, 1)
    return clamped.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _to_floats(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(255)


def _frames(path: str | os.PathLike[str], count: int | None) -> Iterator[np.ndarray]:
    """The first `count` frames of a video file, or all: each (H, W, 3) bytes."""
    path = expand_home(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a video file, but there is no such file")
    check_file(path)
    yield from (_frames_of_gif if path.suffix.lower() == ".gif" else _frames_by_ffmpeg)(path, count)


def _frames_of_gif(path: Path, count: int | None) -> Iterator[np.ndarray]:
    try:
        with Image.open(path) as file:
            for index in itertools.count() if count is None else range(count):
                try:
                    file.seek(index)
                except EOFError:
                    return
                image = file.convert("RGBA")
                yield np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    # What Pillow raises for damaged files, and for those that would take too much memory.
    except (OSError, ValueError, SyntaxError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a gif, got a file that cannot be read as one ({error})") from error


def _frames_by_ffmpeg(path: Path, count: int | None) -> Iterator[np.ndarray]:
    # Portable pixmaps have the frames' size in their header, and ffmpeg has rotated the frames as the file says. A
    # playlist in a video's clothes must not make it open anything but files.
    limit = [] if count is None else ["-frames:v", str(count)]
    decode = ["-an", *limit, "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "-"]
    command = [*_ffmpeg_command(), "-protocol_whitelist", "file", "-i", f"file:{path}", *decode]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        found = False
        try:
            while (frame := _read_pixmap(process.stdout)) is not None:
                found = True
                yield frame
            process.wait()
        finally:  # also if no more frames are asked for
            process.kill()
            process.stdout.close()
            process.wait()
        if process.returncode or not found:
            log.seek(0)
            reason = _reason(log.read(), process.returncode)
            raise ValueError(f"{path}: expected a video, got a file that cannot be read as one ({reason})")


def _read_pixmap(stream: IO[bytes]) -> np.ndarray | None:
    """Reads the next portable pixmap of 8-bit RGB: (H, W, 3), or None at the end of the stream."""
    header = [stream.readline() for _ in range(3)]
    if not header[-1]:
        return None
    width, height = map(int, header[1].split())
    pixels = stream.read(height * width * 3)
    if len(pixels) < height * width * 3:
        return None
    return np.frombuffer(bytearray(pixels), np.uint8).reshape(height, width, 3)


def _ffmpeg(arguments: Sequence[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    # Not through imageio, which does not notice when ffmpeg fails, for example on a full disk.
    command = [*_ffmpeg_command(), *arguments]
    try:
        return subprocess.run(command, input=data, capture_output=True, check=False)
    except OSError as error:
        raise OSError(f"ffmpeg: expected a program that can be run, got {command[0]!r} ({error.strerror})") from error


def _ffmpeg_command() -> list[str]:
    import imageio_ffmpeg

    try:
        return [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    except RuntimeError as error:
        raise OSError(f"ffmpeg: expected a program to read and write videos with, got none ({error})") from error


def _reason(log: bytes, status: int) -> str:
    """Why ffmpeg failed: the last line that it printed."""
    lines = log.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ffmpeg ended with exit status {status} and no frames"
