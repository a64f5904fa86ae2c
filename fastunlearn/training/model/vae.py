"""Latents to pixels and back. A VAE works on one video at a time, to save memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.families import LatentSpace


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, latent_space: LatentSpace) -> Tensor:
    """Decodes normalised latents (B, C, F', h, w) to videos (B, F, 3, H, W), float32 in [0, 1], on the CPU."""
    dtype, device = _dtype_and_device(vae, like=latents)
    mean, std = _mean_and_std(latent_space, device)
    videos = []
    for normalised in latents.split(1):
        z = normalised.to(device, torch.float32) * std
        z = z + mean
        video = vae.decode(z.to(dtype), return_dict=False)[0]
        videos.append((video.float().cpu() / 2 + 0.5).clamp(0, 1).movedim(2, 1))
    return torch.cat(videos)


@torch.no_grad()
def encode_videos(
    vae: Any,
    videos: Tensor,
    latent_space: LatentSpace,
    *,
    sample: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Encodes videos (B, F, 3, H, W) in [0, 1] to normalised latents (B, C, F', h, w), float32, on the VAE's device.

    Args:
        vae: a VAE with `encode(videos).latent_dist`.
        videos: the videos to encode.
        latent_space: the VAE's latent space.
        sample: draw from the VAE's distribution instead of taking its mode.
        generator: draws the samples; on the VAE's device.
    """
    dtype, device = _dtype_and_device(vae, like=videos)
    mean, std = _mean_and_std(latent_space, device)
    latents = []
    for frames in videos.split(1):
        pixels = frames.to(device, torch.float32).movedim(1, 2) * 2 - 1
        distribution = vae.encode(pixels.to(dtype)).latent_dist
        z = distribution.sample(generator) if sample else distribution.mode()
        latents.append((z.float() - mean) / std)
    return torch.cat(latents)


def _mean_and_std(latent_space: LatentSpace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as (C or 1, 1, 1, 1), to broadcast over (B, C, F, h, w)."""
    mean, std = (
        torch.tensor(values, device=device).reshape(-1, 1, 1, 1) for values in (latent_space.mean, latent_space.std)
    )
    return mean, std


def _dtype_and_device(vae: Any, like: Tensor) -> tuple[torch.dtype, torch.device]:
    """Of the VAE's parameters; of `like` if it has none."""
    parameter = next(iter(vae.parameters()), like) if isinstance(vae, nn.Module) else like
    return parameter.dtype, parameter.device
