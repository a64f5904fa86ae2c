"""The user's own videos, or their latents, as the source of a cache's points."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastunlearn.files import open_safetensors, tensor_names
from fastunlearn.training.data.requests import holds_latents
from fastunlearn.training.data.videos import read_first_frames
from fastunlearn.training.model.video_model import VideoModel, VideoSize


def read_latents(model: VideoModel, source: Path, size: VideoSize) -> Tensor:
    """Reads the latents (1, ...) of a source, float32, on the model's device.

    A video is cut to its first frames, scaled to cover `size`, and cropped around its centre.

    Raises:
        ValueError: the file is not readable, the latents have another shape or are not finite, or the video is too
            short.
        RuntimeError: the source is a video, but the model has no VAE.
    """
    if holds_latents(source):
        return _stored_latents(source, model.latent_shape(*size)).to(model.device)
    # Every frame is made small before the next one is read, so that a large video fits into memory.
    frames = [_scale_and_crop(frame, size.height, size.width) for frame in read_first_frames(source, size.num_frames)]
    if len(frames) < size.num_frames:
        raise ValueError(
            f"{source}: expected at least {size.num_frames} frames, got {len(frames)}; lower num_frames or remove the "
            "video"
        )
    return model.encode_video(torch.cat(frames)[None]).float().to(model.device)


def _stored_latents(source: Path, shape: tuple[int, ...]) -> Tensor:
    """The tensor (1, *shape) in a file of latents, float32; stored with or without the batch dimension."""
    with open_safetensors(source) as file:
        if "latents" not in tensor_names(file):
            raise ValueError(f"{source}: expected a tensor called 'latents', got {tensor_names(file)}")
        latents: Tensor = file.get_tensor("latents").float()
    if latents.dim() == len(shape) + 1 and len(latents) == 1:
        latents = latents[0]
    if tuple(latents.shape) != shape:
        raise ValueError(f"{source}: expected latents of shape {shape}, got {tuple(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise ValueError(f"{source}: expected finite latents, got NaN or infinity")
    return latents[None]


def _scale_and_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames (F, 3, H, W) scaled to cover `height` x `width` pixels, and cropped to it."""
    scale = max(height / frames.shape[2], width / frames.shape[3])
    size = (max(height, round(frames.shape[2] * scale)), max(width, round(frames.shape[3] * scale)))
    if size != tuple(frames.shape[2:]):
        frames = interpolate(frames, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].clamp(0, 1)
