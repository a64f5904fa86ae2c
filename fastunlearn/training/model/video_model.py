"""A text-to-video model without its text encoder: what every phase after the prompts' encoding works with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn import erasers, schedule
from fastunlearn.erasers import AdapterEraser
from fastunlearn.families import Family, LatentSpace, family_of, patch_size
from fastunlearn.velocity_model import as_velocity_model

Erasers = dict[str, AdapterEraser]
_EXPERTS = ("transformer", "transformer_2")


class VideoSize(NamedTuple):
    """The size of a video: height and width in pixels, and how many frames."""

    height: int
    width: int
    num_frames: int


class Defaults(NamedTuple):
    """What a pipeline uses where the user gives nothing. Height and width are in pixels, fps in frames per second."""

    guidance_scale: float
    height: int
    width: int
    num_frames: int
    fps: int

    def size(self, height: int | None = None, width: int | None = None, num_frames: int | None = None) -> VideoSize:
        """The given size; the default replaces each number that is None."""
        return VideoSize(
            self.height if height is None else height,
            self.width if width is None else width,
            self.num_frames if num_frames is None else num_frames,
        )

    def guidance(self, guidance_scale: float | None) -> float:
        """The given classifier-free guidance scale; the default if it is None."""
        return self.guidance_scale if guidance_scale is None else guidance_scale


class VideoModel:
    """One or two velocity models with their noise schedule, and the VAE if it is wanted. Frozen, in eval mode.

    Attributes:
        path: the folder or Hub id it was loaded from.
        family: what is known of its family.
        experts: the velocity models: one, or for Wan2.2-A14B two, for high noise and for low noise.
        boundary: the timestep (0 to 1000) that divides the experts; the first is for those at or above. None with one.
        scheduler: the diffusers scheduler it is sampled with.
        vae: the VAE; None unless it was asked for.
        latent_space: sizes and scale of its latents.
        defaults: of sampling.
    """

    def __init__(
        self,
        transformers: Sequence[nn.Module],
        scheduler: Any,
        *,
        latent_space: LatentSpace,
        defaults: Defaults,
        vae: Any = None,
        boundary: float | None = None,
        path: str = "",
    ) -> None:
        """Takes the parts as they are, and freezes them.

        Args:
            transformers: of one supported family, one or two.
            scheduler: of the pipeline.
            latent_space: of the VAE.
            defaults: of sampling.
            vae: with `encode(videos).latent_dist` and `decode(latents, return_dict=False)[0]`, videos and latents
                (B, C, F, H, W), videos in [-1, 1].
            boundary: the timestep that divides two transformers.
            path: for the record.

        Raises:
            TypeError: a transformer is of no supported family.
            ValueError: not one or two transformers of one family, or two without a boundary, or a boundary without two.
        """
        self.experts = tuple(as_velocity_model(transformer) for transformer in transformers)
        families = {family_of(expert).name for expert in self.experts}
        if len(self.experts) not in (1, 2) or len(families) != 1:
            raise ValueError(
                f"transformers: expected one or two of a family, got {[type(x).__name__ for x in transformers]}"
            )
        if (boundary is None) != (len(self.experts) == 1):
            raise ValueError(
                f"boundary: expected a timestep for two transformers and None for one, got {boundary} for "
                f"{len(self.experts)}"
            )
        self.family: Family = family_of(self.experts[0])
        self.scheduler = scheduler
        self.vae = vae
        self.latent_space = latent_space
        self.defaults = defaults
        self.boundary = boundary
        self.path = path
        for part in (*self.experts, vae):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(self.experts[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the experts compute in, and want latents in."""
        transformer: Any = self.experts[0].transformer
        dtype: torch.dtype = transformer.dtype
        return dtype

    def expert_index(self, t: float) -> int:
        """Which of the experts is for timestep `t`."""
        return 0 if self.boundary is None or t >= self.boundary else 1

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """The shape, without a batch, of the latents of a video `height` x `width` pixels with `num_frames` frames.

        A model whose tokens cover several latent frames gets some more of these if need be, as in its pipeline.

        Raises:
            ValueError: a size does not divide into tokens.
        """
        patch_frames, *patch = patch_size(self.experts[0])
        for name, size, unit in (
            ("height", height, self.latent_space.pixels * patch[0]),
            ("width", width, self.latent_space.pixels * patch[1]),
        ):
            if size < unit or size % unit:
                raise ValueError(f"{name}: expected a positive multiple of {unit}, got {size}")
        unit = self.latent_space.frames
        if num_frames < 1 or (num_frames - 1) % unit:
            raise ValueError(f"num_frames: expected 1 more than a multiple of {unit}, got {num_frames}")
        frames = self._latent_frames(num_frames)
        frames += -frames % patch_frames
        shape = [frames, height // self.latent_space.pixels, width // self.latent_space.pixels]
        transformer: Any = self.experts[0].transformer
        shape.insert(self.family.channel_dim - 1, transformer.config.in_channels)
        return tuple(shape)

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of the video tokens of a latent of `latent_shape`, which has no batch dimension."""
        sizes = [size for dim, size in enumerate(latent_shape, start=1) if dim != self.family.channel_dim]
        frames, rows, columns = (size // unit for size, unit in zip(sizes, patch_size(self.experts[0]), strict=True))
        return frames, rows, columns

    @torch.no_grad()
    def decode(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """The videos of latents (B, ...): (B, F, 3, H, W) float32 in [0, 1], on the CPU. One at a time, to save memory.

        Args:
            latents: as the model makes them.
            num_frames: how many frames were asked of `latent_shape`, which may have given more; all of them if None.

        Raises:
            RuntimeError: the model was loaded without its VAE.
        """
        vae = self._loaded_vae()
        z = self._channels_first(latents)
        if num_frames is not None:
            z = z[:, :, z.shape[2] - self._latent_frames(num_frames) :]
        dtype, device = _dtype_and_device(vae, like=latents)
        videos = []
        for one in z.split(1):
            one = one.to(device, torch.float32) * self._per_channel("std", device)
            one = one + self._per_channel("mean", device)
            video = vae.decode(one.to(dtype), return_dict=False)[0]
            videos.append((video.float().cpu() / 2 + 0.5).clamp(0, 1).movedim(2, 1))
        return torch.cat(videos)

    @torch.no_grad()
    def encode_video(self, frames: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """The latents (B, ...) of videos, float32, on the VAE's device.

        Args:
            frames: (B, F, 3, H, W) in [0, 1], sizes as `latent_shape` wants them.
            sample: draw from the VAE's distribution instead of taking its mode.
            generator: to draw with, on the VAE's device.

        Raises:
            RuntimeError: the model was loaded without its VAE.
            ValueError: the frames have a shape that does not fit.
        """
        vae = self._loaded_vae()
        if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise ValueError(
                f"frames: expected (B, F, 3, H, W) in [0, 1], got shape {tuple(frames.shape)} of {frames.dtype}"
            )
        batch, count, _, height, width = frames.shape
        shape = self.latent_shape(height, width, count)
        dtype, device = _dtype_and_device(vae, like=frames)
        encoded = []
        for one in frames.split(1):
            video = one.to(device, torch.float32).movedim(1, 2) * 2 - 1
            distribution = vae.encode(video.to(dtype)).latent_dist
            z = distribution.sample(generator) if sample else distribution.mode()
            z = (z.float() - self._per_channel("mean", device)) / self._per_channel("std", device)
            encoded.append(z)
        latents = torch.cat(encoded)
        missing = shape[2 - self.family.channel_dim] - latents.shape[2]
        if missing:  # frames that make the tokens whole stand at the front
            latents = torch.cat([latents[:, :, :missing], latents], dim=2)
        return latents.movedim(1, self.family.channel_dim)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, on the family's path from x_0 to noise. x_0, noise: (B, ...). t: (B,), 0 to 1000. Returns x_0's dtype.

        Raises:
            ValueError: `t` has another shape, or is out of range.
            TypeError: `t` has fractions where the schedule has none.
        """
        if t.shape != x_0.shape[:1]:
            raise ValueError(f"t: expected shape ({x_0.shape[0]},), one timestep a sample, got {tuple(t.shape)}")
        if not self.family.flow_matching:
            whole = t.long()
            if t.is_floating_point() and not torch.equal(whole.to(t.dtype), t):
                raise TypeError(f"t: expected whole timesteps for {self.family.name}, got {t.tolist()}")
            return schedule.add_noise(x_0, noise, self.scheduler.alphas_cumprod, whole)
        timesteps = self.scheduler.config.num_train_timesteps
        if ((t < 0) | (t > timesteps)).any():
            raise ValueError(f"t: expected timesteps from 0 to {timesteps}, got {t.tolist()}")
        sigma = (t.to(x_0.device, torch.float64) / timesteps).reshape(-1, *[1] * (x_0.dim() - 1))
        return torch.lerp(x_0.double(), noise.double(), sigma).to(x_0.dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Keeps no activations inside the experts' blocks: they are computed again for the backward pass."""
        for expert in self.experts:
            transformer: Any = expert.transformer
            transformer.enable_gradient_checkpointing()

    def attach_erasers(self, rank: int = 128, name: str = "default") -> list[Erasers]:
        """Fresh erasers on every expert, as `fastunlearn.attach_erasers` makes them: by layer, for each expert."""
        return [erasers.attach_erasers(expert, rank, name) for expert in self.experts]

    def save_erasers(self, folder: str | os.PathLike[str], name: str = "default", concept: str | None = None) -> None:
        """Saves the erasers called `name`, as `fastunlearn.save_erasers` does.

        Into the folder itself, or into `transformer` and `transformer_2` in it where there are two experts.
        """
        for expert, part in zip(self.experts, self._parts(folder), strict=True):
            erasers.save_erasers(expert, part, name, concept)

    def load_erasers(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        names: Sequence[str] | None = None,
        scales: Sequence[float] | None = None,
    ) -> dict[str, list[Erasers]]:
        """Attaches what `save_erasers` saved; of several folders, all together. If one does not fit, none is attached.

        Args:
            folders: one or several.
            names: what to call them; "default" for one folder, the folders' own names for several.
            scales: by how much their outputs are multiplied; 1 each by default.

        Returns:
            By name: the erasers by layer, for each expert.

        Raises:
            FileNotFoundError: a folder holds no erasers, or lacks those of an expert.
            ValueError: names or scales are not as many as folders, or erasers do not fit the model.
        """
        chosen = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        if names is None:
            names = ["default"] if len(chosen) == 1 else [Path(folder).resolve().name for folder in chosen]
        for part in (part for folder in chosen for part in self._parts(folder)):
            if not part.is_dir():
                raise FileNotFoundError(f"{part}: no such folder; erasers of {self._described()} were expected")
        loaded: list[dict[str, Erasers]] = []
        try:
            for index, expert in enumerate(self.experts):
                parts = [self._parts(folder)[index] for folder in chosen]
                loaded.append(erasers.load_erasers(expert, parts, names=names, scales=scales))
        except Exception:
            for expert, _ in zip(self.experts, loaded, strict=False):  # those that went well
                for name in names:
                    erasers.detach_erasers(expert, name)
            raise
        return {name: [sets[name] for sets in loaded] for name in names}

    def _parts(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Where in `folder` each expert's erasers belong."""
        return [Path(folder)] if len(self.experts) == 1 else [Path(folder) / name for name in _EXPERTS]

    def _described(self) -> str:
        many = "one transformer" if len(self.experts) == 1 else "two transformers, in folders of these names,"
        return f"{self.family.name} with {many}"

    def _latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // self.latent_space.frames + 1

    def _loaded_vae(self) -> Any:
        if self.vae is None:
            raise RuntimeError("the model was loaded without its VAE; load it with load_model(..., vae=True)")
        return self.vae

    def _channels_first(self, latents: Tensor) -> Tensor:
        return latents.movedim(self.family.channel_dim, 1)

    def _per_channel(self, name: str, device: torch.device) -> Tensor:
        return torch.tensor(getattr(self.latent_space, name), device=device).reshape(-1, 1, 1, 1)


def _dtype_and_device(vae: Any, like: Tensor) -> tuple[torch.dtype, torch.device]:
    """Of the VAE's parameters; of `like` where it has none."""
    parameter = next(iter(vae.parameters()), like) if isinstance(vae, nn.Module) else like
    return parameter.dtype, parameter.device
