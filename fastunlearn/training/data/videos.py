"""Reads and writes video files."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastunlearn.files import expand_home, replace_file

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

    Reads gif and every format that ffmpeg reads. Sound is ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a readable video.
        OSError: ffmpeg is not installed.
    """
    path = expand_home(path)
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
            raise OSError(f"{path}: cannot be written: {_reason(process)}")
        replace_file(path, encoded.read_bytes())


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
