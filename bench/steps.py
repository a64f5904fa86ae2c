"""A step of training as we do it and as it is published, on one CogVideoX with random weights.

Every step is of one target point and one kept one.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from fastunlearn import AttnMapsCapture, EraserOutputsCapture, localization_loss
from fastunlearn.bench.cases import ETA, Disagreement
from fastunlearn.bench.published import Conditions, PublishedStep
from fastunlearn.families import LatentSpace
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.loop import trainer
from fastunlearn.training.loop.terms import Terms
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import Defaults, VideoModel
from fastunlearn.training.options import PrepareOptions, TrainingOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.train import train

TARGET, KEPT, UNCOND = "a circle", "a square", ""
WORDS = [1]  # where "circle" stands in the first
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Size:
    """Of a CogVideoX, of its videos in pixels and frames, and of its erasers."""

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
        """Of a token."""
        return self.heads * self.channels

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Of a video."""
        frames, rows, columns = self.latents
        return frames * rows * columns // 4


SIZES = {
    "tiny": Size(4, 8, 32, 256, 256, 13, text_tokens=32, text_features=64, time_features=128, rank=16),
    "cogvideox-2b": Size(30, 30, 64, 480, 720, 49, text_tokens=226, text_features=4096, time_features=512, rank=128),
    "cogvideox-5b": Size(
        42, 48, 64, 480, 720, 49, text_tokens=226, text_features=4096, time_features=512, rank=128, rotary=True
    ),
}


class Sample(NamedTuple):
    """What a call of a peer measured, a step."""

    passes: float
    seconds: float


class RanOut(RuntimeError):
    """Memory did; the message says at what."""


class _Passes:
    """Counts the samples that go through transformers: a batch of two is two."""

    def __init__(self, *models: nn.Module) -> None:
        self.count = 0
        for model in models:
            model.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, velocity: Tensor) -> None:
        self.count += len(velocity)


class _DenseTerms(Terms):
    """The losses of a step with the localization of whole outputs, not of low-rank ones."""

    def of_target(
        self, student: Any, erasers: Mapping[str, nn.Module], points: Any, guidance_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        outputs: dict[str, Tensor] = {}
        without = Terms(replace(self._options, localization_weight=0.0), device=self._device, dtype=self._dtype)
        with EraserOutputsCapture(student, erasers, outputs):
            unlearning, _ = without.of_target(student, erasers, points, guidance_scale)
        elements = next(iter(outputs.values()))[0].numel()
        weight = self._options.localization_weight / elements
        return unlearning, localization_loss(outputs, points.mask.to(self._device), weight=weight).loss


class Bench:
    """Builds the model, and runs a peer's step on it.

    Args:
        size: of the model.
        device: where.
        dtype: of its weights; erasers are float32.
        sampling_steps: of a trajectory.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, sampling_steps: int) -> None:
        self.size, self.device, self.dtype, self.sampling_steps = size, device, dtype, sampling_steps
        generator = torch.Generator().manual_seed(0)
        self._encoded = {
            prompt: EncodedPrompt(
                prompt,
                {
                    "encoder_hidden_states": torch.randn(size.text_tokens, size.text_features, generator=generator).to(
                        device, dtype
                    )
                },
                WORDS if prompt == TARGET else [],
            )
            for prompt in (TARGET, KEPT, UNCOND)
        }
        self.training = TrainingOptions("", Path(), Path(), rank=size.rank, checkpointing_steps=10**9)

    def transformer(self) -> Any:
        """A CogVideoX transformer, with the same weights at every call."""
        from diffusers import CogVideoXTransformer3DModel

        size = self.size
        frames, rows, columns = size.latents
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # else it would be float32 first, twice as large
        try:
            with torch.random.fork_rng(), torch.device(self.device):
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
        return transformer.to(self.device).eval()  # what came from NumPy

    def model(self) -> VideoModel:
        """The same as a pipeline would give it."""
        size = self.size
        defaults = Defaults(6.0, size.height, size.width, size.num_frames, 8)
        return VideoModel(
            [self.transformer()], self._scheduler(), latent_space=LatentSpace(4, 8), defaults=defaults, path=""
        )

    def _scheduler(self) -> Any:
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0 if self.size.rotary else 3.0,
        )

    def wait(self) -> None:
        """Until the device has done what it was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def make_cache(self, folder: Path, trajectories: int) -> Sample:
        """Makes a teacher cache of so many trajectories for the target, and as many to keep; the cost is of each."""
        model = self.model()
        passes = _Passes(*model.experts)
        options = PrepareOptions("", folder, "circle", num_inference_steps=self.sampling_steps, mixed_precision="no")
        requests = [Request(TARGET), Request(KEPT, group="kept")] * trajectories
        start = time.perf_counter()
        prepare(model, self._encoded, requests, folder, options)
        self.wait()
        return Sample(passes.count / len(requests), (time.perf_counter() - start) / len(requests))

    def published_step(self, **options: Any) -> PublishedStep:
        """Theirs, with our weights of the losses: our localization loss is a mean over tokens and features."""
        weights = self.training
        conditions = (self._encoded[prompt].condition["encoder_hidden_states"] for prompt in (TARGET, KEPT, UNCOND))
        return PublishedStep(
            self.transformer(),
            self._scheduler(),
            Conditions(*(condition[None] for condition in conditions)),
            WORDS,
            rank=self.size.rank,
            weights=(
                weights.unlearning_weight,
                weights.preservation_weight,
                weights.localization_weight / (self.size.tokens * self.size.features),
            ),
            sampling_steps=self.sampling_steps,
            **options,
        )

    def published(self, call: int, calls: int, *, to_the_end: bool = False, checkpointing: bool = False) -> Sample:
        """A step of theirs, after a first one. Over all calls the random steps are spread evenly."""
        frames, rows, columns = self.size.latents
        noise = torch.randn(1, frames, 16, rows, columns, device=self.device, dtype=self.dtype)
        until = self.sampling_steps if to_the_end else int((call + 0.5) / calls * self.sampling_steps)
        step: PublishedStep | None = None
        try:
            step = self.published_step(checkpointing=checkpointing)
            step.step(noise, 1)
            self.wait()
            passes, start = _Passes(step.original, step.trained), time.perf_counter()
            step.step(noise, until)
            self.wait()
        except torch.OutOfMemoryError:
            raise RanOut("building the models" if step is None else step.doing) from None
        return Sample(passes.count, time.perf_counter() - start)

    def ours(self, cache: TeacherCache, *, low_rank: bool = True, steps: int = 3, **options: Any) -> Sample:
        """Steps of ours, after a first one."""
        times: list[float] = []
        terms = Terms if low_rank else _DenseTerms
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(trainer, "Terms", terms),
            contextlib.redirect_stderr(io.StringIO()),  # progress bars
        ):
            chosen = replace(self.training, max_train_steps=1 + steps, **options)
            try:
                model = self.model()
                passes = _Passes(*model.experts)
                train(model, cache, folder, chosen, on_step=lambda *_: times.append(time.perf_counter()))
            except (torch.OutOfMemoryError, MemoryError):
                raise RanOut("the student") from None
        return Sample(passes.count / (1 + steps), (times[-1] - times[0]) / steps)


def check(bench: Bench) -> float:
    """Compares both steps' attention maps, losses and gradients, at points of a teacher cache.

    Returns:
        The largest relative difference.

    Raises:
        Disagreement: it is more than `TOLERANCE` has for the dtype.
    """
    tolerance = TOLERANCE[bench.dtype]
    step = bench.published_step()
    with torch.no_grad():
        for eraser in step.erasers.values():
            nn.init.normal_(eraser.up.weight, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        bench.make_cache(Path(folder), 1)
        cache = TeacherCache.open(folder)
        target, kept = (cache.groups[name].rows([len(cache.groups[name]) // 2]) for name in ("target", "kept"))
    x_t, x_t_kept = (points.x_t.to(bench.device, bench.dtype) for points in (target, kept))
    t, t_kept, mask = target.t.to(bench.device), kept.t.to(bench.device), target.mask
    if mask is None:
        raise Disagreement("the cache has no masks")
    theirs = step.losses(x_t, t, mask.to(bench.device), x_t_kept, t_kept)
    terms = Terms(bench.training, device=bench.device, dtype=bench.dtype)
    unlearning, localization = terms.of_target(step.trained, step.erasers, target, ETA)
    ours = (unlearning, terms.of_kept(step.trained, kept), localization)
    worst = 0.0

    def agree(what: str, mine: Tensor, other: Tensor) -> None:
        nonlocal worst
        error = float((mine.double() - other.double()).norm() / other.double().norm())
        worst = max(worst, error)
        if not error <= tolerance:
            raise Disagreement(f"{what}: relative difference {error:.1e}, at most {tolerance:.0e} expected")

    for name, weight, mine, other in zip(theirs._fields, step.weights, ours, theirs, strict=True):
        if mine is None:
            raise Disagreement(f"{name} loss: ours has none")
        other = weight * other
        agree(f"{name} loss", mine.detach(), other.detach())
        derived = (torch.autograd.grad(loss, step.parameters, retain_graph=True) for loss in (mine, other))
        agree(f"gradient of the {name} loss", *(torch.cat([x.flatten() for x in gradients]) for gradients in derived))
    captured: dict[str, Tensor] = {}
    with torch.no_grad(), AttnMapsCapture(step.trained, captured):
        step.trained(x_t, t, target.condition["encoder_hidden_states"].to(bench.device))
    for mine, other in zip(captured.values(), step.maps(x_t, t).values(), strict=True):
        agree("attention maps", mine, other)
    return worst
