"""Given videos, or latents of videos, as the source of a cache's points."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import interpolate

from fastunlearn.training import shards
from fastunlearn.training.plan import Request
from fastunlearn.training.prompts import occurrences, read_prompts
from fastunlearn.training.video_model import VideoModel
from fastunlearn.training.videos import read_video

VIDEOS, LATENTS = (".mp4", ".gif"), ".safetensors"


def read_data(folder: str | os.PathLike[str], concept: str) -> list[Request]:
    """A request for each video in a folder: of group "target" where its prompt has the concept, else of "kept".

    Beside `NAME.mp4` or `NAME.gif`, or the latents `NAME.safetensors`, stands the prompt in `NAME.txt`. After a tab
    there may be another, without the concept.

    Raises:
        FileNotFoundError: there is no such folder, or no prompt beside a video.
        ValueError: there are no videos, or a text file holds more than one line, or the concept after its tab.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of videos, got {str(folder)!r}")
    sources = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*VIDEOS, LATENTS))
    if not sources:
        raise ValueError(f"data: expected {', '.join(VIDEOS)} or {LATENTS} files in {folder}, found none")
    requests = []
    for source in sources:
        lines = read_prompts(source.with_suffix(".txt"))
        if len(lines) != 1:
            raise ValueError(f"{source.with_suffix('.txt')}: expected one prompt, found {len(lines)}")
        prompt, instead = lines[0]
        if instead is not None and occurrences(instead, concept):
            raise ValueError(
                f"{source.with_suffix('.txt')}: expected a prompt without {concept!r} after the tab, got {instead!r}"
            )
        group = "target" if occurrences(prompt, concept) else "kept"
        requests.append(Request(prompt, group, instead, source=source))
    return requests


def holds_latents(source: Path) -> bool:
    """Whether a source is latents already, which need no VAE."""
    return source.suffix.lower() == LATENTS


def read_latents(
    model: VideoModel, source: Path, latent_shape: Sequence[int], height: int, width: int, num_frames: int
) -> Tensor:
    """The latents (1, *latent_shape) of a source, float32, on the model's device.

    A video is cut to its first frames, scaled to cover the size, and cropped around its middle.

    Raises:
        ValueError: the file is not readable, the latents are of another shape or not finite, or the video is too short.
        RuntimeError: the source is a video, and the model has no VAE.
    """
    if holds_latents(source):
        with shards.opened(source) as file:
            if "latents" not in shards.names(file):
                raise ValueError(f"{source}: expected a tensor called 'latents', got {shards.names(file)}")
            latents: Tensor = file.get_tensor("latents").float()
        if latents.dim() == len(latent_shape) + 1 and len(latents) == 1:
            latents = latents[0]
        if tuple(latents.shape) != tuple(latent_shape) or not bool(latents.isfinite().all()):
            raise ValueError(
                f"{source}: expected finite latents of shape {tuple(latent_shape)}, got {tuple(latents.shape)}"
            )
        return latents[None].to(model.device)
    frames = read_video(source)
    if len(frames) < num_frames:
        raise ValueError(f"{source}: expected at least {num_frames} frames, got {len(frames)}; lower num_frames")
    return model.encode_video(_covering(frames[:num_frames], height, width)[None]).float().to(model.device)


def _covering(frames: Tensor, height: int, width: int) -> Tensor:
    """(F, 3, H, W) scaled and cropped to height x width."""
    scale = max(height / frames.shape[2], width / frames.shape[3])
    size = (max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale)))
    if size != tuple(frames.shape[2:]):
        frames = interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].clamp(0, 1)
