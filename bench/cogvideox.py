"""A CogVideoX with random weights, at the size of a published model or a small one. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastunlearn.families import LatentSpace
from fastunlearn.training.model.video_model import Defaults, VideoModel


@dataclass(frozen=True)
class Size:
    """The size of a model, its videos and its erasers.

    Attributes:
        layers: transformer blocks.
        heads: attention heads.
        channels: channels per head.
        height: height of a video, in pixels.
        width: width of a video, in pixels.
        num_frames: frames of a video.
        text_tokens: tokens of a prompt, padding included.
        text_features: features of a text embedding.
        time_features: features of the timestep embedding.
        rank: inner width of an eraser.
        rotary: whether positions are rotary embeddings, as in CogVideoX-5B.
    """

    layers: int
    heads: int
    channels: int
    height: int
    width: int
    num_frames: int
    text_tokens: int
    text_features: int
    time_features: int
    rank: int
    rotary: bool = False

    @property
    def features(self) -> int:
        """Features of a token."""
        return self.heads * self.channels

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a video's latents."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Tokens of a video."""
        frames, rows, columns = self.latents
        return frames * rows * columns // 4


SIZES = {
    "tiny": Size(4, 8, 32, 256, 256, 13, text_tokens=32, text_features=64, time_features=128, rank=16),
    "cogvideox-2b": Size(30, 30, 64, 480, 720, 49, text_tokens=226, text_features=4096, time_features=512, rank=128),
    "cogvideox-5b": Size(
        42, 48, 64, 480, 720, 49, text_tokens=226, text_features=4096, time_features=512, rank=128, rotary=True
    ),
}


def random_transformer(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A CogVideoX transformer in eval mode, with the same random weights at every call."""
    from diffusers import CogVideoXTransformer3DModel

    _, rows, columns = size.latents
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # without this the weights are float32 first, twice as large
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            transformer = CogVideoXTransformer3DModel(
                num_attention_heads=size.heads,
                attention_head_dim=size.channels,
                num_layers=size.layers,
                time_embed_dim=size.time_features,
                text_embed_dim=size.text_features,
                max_text_seq_length=size.text_tokens,
                sample_width=columns,
                sample_height=rows,
                sample_frames=size.num_frames,
                use_rotary_positional_embeddings=size.rotary,
            )
    finally:
        torch.set_default_dtype(default)
    return transformer.to(device).eval()  # diffusers makes some buffers with NumPy, on the CPU


def scheduler(size: Size) -> Any:
    """The scheduler that the published model of this kind has."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if size.rotary else 3.0,
    )


def random_model(size: Size, device: torch.device, dtype: torch.dtype) -> VideoModel:
    """The transformer and scheduler as `fastunlearn.training` takes them."""
    defaults = Defaults(6.0, size.height, size.width, size.num_frames, 8)
    transformer = random_transformer(size, device, dtype)
    return VideoModel([transformer], scheduler(size), latent_space=LatentSpace(4, 8), defaults=defaults, path="")
