"""Given videos, or latents of videos, as the source of a cache's points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.functional import interpolate

from fastunlearn.files import open_safetensors, tensor_names
from fastunlearn.training.data.videos import read_video
from fastunlearn.training.model.video_model import VideoModel

VIDEOS, LATENTS = (".mp4", ".gif"), ".safetensors"


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
        with open_safetensors(source) as file:
            if "latents" not in tensor_names(file):
                raise ValueError(f"{source}: expected a tensor called 'latents', got {tensor_names(file)}")
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
