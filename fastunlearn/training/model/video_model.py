"""A loaded text-to-video model without its text encoders, which are not needed once the prompts are encoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn import eraser_files, erasers, schedule
from fastunlearn.dtypes import widest_dtype
from fastunlearn.erasers import AdapterEraser
from fastunlearn.erasers.saved import collect_erasers
from fastunlearn.families import EXPERTS, Family, LatentSpace, family_of, find_transformer, patch_size, token_grid
from fastunlearn.files import expand_home
from fastunlearn.offloading import computing_device
from fastunlearn.training.model.vae import decode_latents, encode_videos
from fastunlearn.velocity_model import as_velocity_model

Erasers = dict[str, AdapterEraser]  # by layer


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
    """The transformers of one pipeline with their noise schedule, and optionally the VAE. Frozen, in eval mode.

    Most pipelines have one transformer. Wan2.2-A14B has two experts: one for high noise, one for low noise.

    Attributes:
        path: the folder or Hub id that it was loaded from.
        family: what is known of its family.
        experts: its one or two transformers, as velocity models.
        boundary: the timestep (0 to 1000) that divides two experts: the first one serves the timesteps at or above
            it. None if there is one expert.
        scheduler: the pipeline's diffusers scheduler.
        vae: the VAE; None if the model was loaded without it.
        latent_space: how its latents relate to a video.
        defaults: the pipeline's default sizes and guidance scale.
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
        """Takes the components as they are, and freezes them.

        Args:
            transformers: one or two of one supported family.
            scheduler: the pipeline's scheduler.
            latent_space: the VAE's latent space.
            defaults: the pipeline's defaults.
            vae: a VAE with `encode(videos).latent_dist` and `decode(latents, return_dict=False)[0]`; videos and
                latents are (B, C, F, H, W), videos in [-1, 1].
            boundary: the timestep that divides two transformers.
            path: where the model comes from; only reported.

        Raises:
            TypeError: a transformer is of no supported family.
            ValueError: the transformers are of different families or more than two, or there is a boundary for one
                transformer or none for two.
        """
        self.experts = tuple(as_velocity_model(transformer) for transformer in transformers)
        families = {family.name: family for family in map(family_of, self.experts)}
        family = next(iter(families.values()), None)
        if family is None or len(families) > 1 or len(self.experts) > len(EXPERTS):
            raise ValueError(
                "transformers: expected one or two of one family, "
                f"got {[type(transformer).__name__ for transformer in transformers]}"
            )
        if (boundary is None) != (len(self.experts) == 1):
            raise ValueError(
                f"boundary: expected a timestep for two transformers and None for one, got {boundary} for "
                f"{len(self.experts)}"
            )
        self.family: Family = family
        self.scheduler = scheduler
        self.vae = vae
        self.latent_space = latent_space
        self.defaults = defaults
        self.boundary = boundary
        self.path = path
        for component in (*self.experts, vae):
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """The device that the experts compute on."""
        transformer, _ = find_transformer(self.experts[0])
        return computing_device(transformer, transformer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the experts compute in and expect latents in."""
        transformer: Any = self.experts[0].transformer
        dtype: torch.dtype = transformer.dtype
        return dtype

    def expert_index(self, t: float) -> int:
        """The index of the expert that serves timestep `t`."""
        return 0 if self.boundary is None or t >= self.boundary else 1

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """The latent shape, without a batch dimension, of a video of `height` x `width` pixels and `num_frames` frames.

        Where a token covers several latent frames, the number of latent frames is rounded up to whole tokens, as the
        pipeline does.

        Raises:
            ValueError: a size does not divide into whole tokens, or the transformer has no positions for so many.
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
        self._check_positions(height, width, num_frames)
        shape = [frames, height // self.latent_space.pixels, width // self.latent_space.pixels]
        transformer: Any = self.experts[0].transformer
        shape.insert(self.family.channel_dim - 1, transformer.config.in_channels)
        return tuple(shape)

    def _check_positions(self, height: int, width: int, num_frames: int) -> None:
        patch_frames, *patch = patch_size(self.experts[0])
        transformer: Any = self.experts[0].transformer
        most_frames, *most = self.family.largest_grid(transformer.config)
        limits = [
            None if count is None else count * unit * self.latent_space.pixels
            for count, unit in zip(most, patch, strict=True)
        ]
        limits.append(None if most_frames is None else (most_frames * patch_frames - 1) * self.latent_space.frames + 1)
        for name, size, limit in zip(VideoSize._fields, (height, width, num_frames), limits, strict=True):
            if limit is not None and size > limit:
                raise ValueError(
                    f"{name}: expected at most {limit}, which this transformer has positions for; got {size}"
                )

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """The (frames, rows, columns) of video tokens in a latent of `latent_shape`, which has no batch dimension."""
        return token_grid(self.experts[0], latent_shape)

    def decode(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """Decodes latents (B, ...) to videos (B, F, 3, H, W), float32 in [0, 1], on the CPU.

        Args:
            latents: in the transformer's layout.
            num_frames: the number of frames given to `latent_shape`, which may have rounded it up; the surplus frames
                are dropped. None keeps all frames.

        Raises:
            RuntimeError: the model was loaded without its VAE.
        """
        vae = self._loaded_vae()
        z = latents.movedim(self.family.channel_dim, 1)
        if num_frames is not None:
            z = z[:, :, z.shape[2] - self._latent_frames(num_frames) :]
        return decode_latents(vae, z, self.latent_space)

    def encode_video(self, frames: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encodes videos to latents (B, ...), float32, on the VAE's device.

        Args:
            frames: (B, F, 3, H, W) in [0, 1], of a size that `latent_shape` accepts.
            sample: draw from the VAE's distribution instead of taking its mode.
            generator: draws the samples; on the VAE's device.

        Raises:
            RuntimeError: the model was loaded without its VAE.
            ValueError: the frames have a shape or size that does not fit.
        """
        vae = self._loaded_vae()
        if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise ValueError(
                f"frames: expected (B, F, 3, H, W) in [0, 1], got shape {tuple(frames.shape)} of {frames.dtype}"
            )
        _, num_frames, _, height, width = frames.shape
        shape = self.latent_shape(height, width, num_frames)
        latents = encode_videos(vae, frames, self.latent_space, sample=sample, generator=generator)
        missing = shape[2 - self.family.channel_dim] - latents.shape[2]
        if missing:  # the frames that fill up the tokens go in front, as in the pipeline
            latents = torch.cat([latents[:, :, :missing], latents], dim=2)
        return latents.movedim(1, self.family.channel_dim)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noises x_0 to timestep t by the family's noise schedule.

        Args:
            x_0: (B, ...) clean latents.
            noise: (B, ...) standard normal.
            t: (B,) timesteps, 0 to 1000.

        Returns:
            x_t, in x_0's dtype.

        Raises:
            ValueError: `t` has another shape or is out of range.
            TypeError: `t` is fractional where the noise schedule has whole timesteps only.
        """
        if t.shape != x_0.shape[:1]:
            raise ValueError(f"t: expected shape ({x_0.shape[0]},), one timestep per sample, got {tuple(t.shape)}")
        if not self.family.flow_matching:
            whole = t.long()
            if t.is_floating_point() and not torch.equal(whole.to(t.dtype), t):
                raise TypeError(f"t: expected whole timesteps for {self.family.name}, got {t.tolist()}")
            return schedule.add_noise(x_0, noise, self.scheduler.alphas_cumprod, whole)
        timesteps = self.scheduler.config.num_train_timesteps
        if ((t < 0) | (t > timesteps)).any():
            raise ValueError(f"t: expected timesteps from 0 to {timesteps}, got {t.tolist()}")
        wide = widest_dtype(x_0.device)
        sigma = (t.to(x_0.device, wide) / timesteps).reshape(-1, *[1] * (x_0.dim() - 1))
        return torch.lerp(x_0.to(wide), noise.to(wide), sigma).to(x_0.dtype)

    def velocity_target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity at `add_noise(x_0, noise, t)` that the model was trained to predict; arguments as there.

        It is noise - x_0 with flow matching, else that of v-prediction. (B, ...) in x_0's dtype.
        """
        if self.family.flow_matching:
            return (noise - x_0).to(x_0.dtype)
        return schedule.velocity_target(x_0, noise, self.scheduler.alphas_cumprod, t.long())

    def estimate_x_0(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The clean latents (B, ...) that the model's `velocity` (B, ...) at x_t and timesteps t (B,) points to."""
        shape = (-1, *[1] * (x_t.dim() - 1))
        if self.family.flow_matching:
            return x_t - (t / self.scheduler.config.num_train_timesteps).reshape(shape).to(x_t) * velocity
        alphas = self.scheduler.alphas_cumprod[t.long().cpu()].reshape(shape).to(x_t)
        return alphas.sqrt() * x_t - (1 - alphas).sqrt() * velocity

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes the activations inside the experts' blocks in the backward pass instead of keeping them."""
        for expert in self.experts:
            transformer: Any = expert.transformer
            transformer.enable_gradient_checkpointing()

    def attach_erasers(self, rank: int = 128, name: str = "default") -> list[Erasers]:
        """Attaches new erasers to every expert, as `fastunlearn.attach_erasers` does. Returns them per expert."""
        return [erasers.attach_erasers(expert, rank, name) for expert in self.experts]

    def save_erasers(self, folder: str | os.PathLike[str], name: str = "default", concept: str | None = None) -> None:
        """Saves the erasers called `name`, as `fastunlearn.save_erasers` does.

        One expert's erasers go into the folder itself; those of two go into subfolders named like the pipeline's
        transformers, `transformer` and `transformer_2`.
        """
        # All are checked before any are written, so that a folder does not end up with half of them replaced.
        collected = [content for expert in self.experts for content in collect_erasers(expert, name, concept)]
        parts = EXPERTS if len(self.experts) > 1 else ("",)
        for part, (_, states, entries) in zip(parts, collected, strict=True):
            eraser_files.write(folder, part, states, entries)

    def load_erasers(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        names: Sequence[str] | None = None,
        scales: Sequence[float] | None = None,
    ) -> dict[str, list[Erasers]]:
        """Attaches erasers that `save_erasers` wrote; those of several folders add up. Attaches all of them or none.

        Args:
            folders: one folder or several.
            names: a name for each folder's erasers. By default "default" for one folder, and the folders' own names
                for several.
            scales: a factor for each folder's eraser outputs; all 1 by default.

        Returns:
            Name -> the erasers per expert.

        Raises:
            FileNotFoundError: a folder holds no erasers, or lacks those of an expert.
            ValueError: there are not as many names or scales as folders, or erasers do not fit the model.
        """
        chosen = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        if names is None:
            names = ["default"] if len(chosen) == 1 else [Path(folder).resolve().name for folder in chosen]
        self._check_folders(chosen)
        loaded: list[dict[str, Erasers]] = []
        try:
            for index, expert in enumerate(self.experts):
                expert_folders = [self._expert_folders(folder)[index] for folder in chosen]
                loaded.append(erasers.load_erasers(expert, expert_folders, names=names, scales=scales))
        except Exception:
            for expert, _ in zip(self.experts, loaded, strict=False):  # those that have theirs already
                for name in names:
                    erasers.detach_erasers(expert, name)
            raise
        return {name: [sets[name] for sets in loaded] for name in names}

    def _expert_folders(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Where in `folder` each expert's erasers belong."""
        if len(self.experts) == 1:
            return [expand_home(folder)]
        return [expand_home(folder) / name for name in EXPERTS]

    def _check_folders(self, folders: Sequence[str | os.PathLike[str]]) -> None:
        for folder in folders:
            for expert_folder in self._expert_folders(folder):
                if not expert_folder.is_dir():
                    count = "one transformer" if len(self.experts) == 1 else "two transformers"
                    raise FileNotFoundError(
                        f"{expert_folder}: expected a folder of erasers for {self.family.name} with {count}, "
                        "got no such folder"
                    )

    def _latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // self.latent_space.frames + 1

    def _loaded_vae(self) -> Any:
        if self.vae is None:
            raise RuntimeError(
                "vae: expected the model's VAE, got a model loaded without it; use load_model(..., vae=True)"
            )
        return self.vae
