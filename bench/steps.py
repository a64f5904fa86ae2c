"""Runs a training step of ours and a published one on the same model, and compares their results.

Every step trains on one target point and one kept point. A point is a noisy video x_t with its timestep.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from fastunlearn import AttnMapsCapture, EraserOutputsCapture, localization_loss
from fastunlearn.bench.agreement import Disagreement, check_relative_difference
from fastunlearn.bench.cases import ETA
from fastunlearn.bench.cogvideox import Size, random_model, random_transformer, scheduler
from fastunlearn.bench.meters import synchronize
from fastunlearn.bench.published import Conditions, PublishedStep
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.requests import Request
from fastunlearn.training.loop import trainer
from fastunlearn.training.loop.terms import Terms
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.options import PrepareOptions, TrainingOptions
from fastunlearn.training.prepare import prepare
from fastunlearn.training.train import train

TARGET, KEPT, UNCOND = "a circle", "a square", ""
WORDS = [1]  # the position of "circle" in the target prompt
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# How many of our training steps a call measures, after a first one that is not measured.
OUR_STEPS = 3


class StepCost(NamedTuple):
    """What one step costs: samples that go through a transformer, and time."""

    passes: float
    seconds: float


class RanOut(RuntimeError):
    """A step ran out of memory. The message says in which phase."""


class _PassCounter:
    """Counts the samples that go through transformers: a batch of two counts as two."""

    def __init__(self, *models: nn.Module) -> None:
        self.count = 0
        for model in models:
            model.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, velocity: Tensor) -> None:
        self.count += len(velocity)


class _DenseTerms(Terms):
    """The losses of a step, with the localization loss of dense outputs instead of low-rank ones."""

    def target_losses(
        self, student: Any, erasers: Mapping[str, nn.Module], points: Any, guidance_scale: float, expert: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        outputs: dict[str, Tensor] = {}
        without = Terms(replace(self._options, localization_weight=0.0), device=self._device, dtype=self._dtype)
        with EraserOutputsCapture(student, erasers, outputs):
            unlearning, _ = without.target_losses(student, erasers, points, guidance_scale, expert)
        mask, weight = points.mask.to(self._device), self._options.localization_weight
        return unlearning, localization_loss(outputs, mask, normalization="mean", weight=weight).loss


class StepRunner:
    """Builds models and runs training steps on them.

    Args:
        size: size of the model.
        device: device of the model.
        dtype: dtype of the model's weights. Erasers are float32.
        sampling_steps: steps of a trajectory.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, sampling_steps: int) -> None:
        self.size, self.device, self.dtype, self.sampling_steps = size, device, dtype, sampling_steps
        generator = torch.Generator().manual_seed(0)
        self._encoded = {}
        for prompt in (TARGET, KEPT, UNCOND):
            text = torch.randn(size.text_tokens, size.text_features, generator=generator).to(device, dtype)
            words = WORDS if prompt == TARGET else []
            self._encoded[prompt] = EncodedPrompt(prompt, {"encoder_hidden_states": text}, words)
        # As the published step trains: the same target and losses, and nothing that it does not measure.
        self.training = TrainingOptions(
            "",
            Path(),
            Path(),
            rank=size.rank,
            checkpointing_steps=10**9,
            relative=False,
            kept_negative_share=0.0,
            validation_share=0.0,
        )

    def make_cache(self, folder: Path, trajectories: int) -> StepCost:
        """Makes a teacher cache with `trajectories` for the target prompt, and as many for the kept one.

        Returns:
            The cost per trajectory.
        """
        model = random_model(self.size, self.device, self.dtype)
        passes = _PassCounter(*model.experts)
        options = PrepareOptions("", folder, "circle", num_inference_steps=self.sampling_steps, mixed_precision="no")
        requests = [Request(TARGET), Request(KEPT, group="kept")] * trajectories
        start = time.perf_counter()
        prepare(model, self._encoded, requests, folder, options)
        synchronize(self.device)
        return StepCost(passes.count / len(requests), (time.perf_counter() - start) / len(requests))

    def published_step(self, **options: Any) -> PublishedStep:
        """A published step with our losses' weights. Our localization loss is a mean over tokens and features."""
        training = self.training
        conditions = (self._encoded[prompt].condition["encoder_hidden_states"] for prompt in (TARGET, KEPT, UNCOND))
        return PublishedStep(
            random_transformer(self.size, self.device, self.dtype),
            scheduler(self.size),
            Conditions(*(condition[None] for condition in conditions)),
            WORDS,
            rank=self.size.rank,
            weights=(
                training.unlearning_weight,
                training.preservation_weight,
                training.localization_weight / (self.size.tokens * self.size.features),
            ),
            sampling_steps=self.sampling_steps,
            **options,
        )

    def run_published(
        self, call: int, calls: int, *, to_the_end: bool = False, checkpointing: bool = False
    ) -> StepCost:
        """Builds both models, takes a published step to warm up, and measures the next one.

        Args:
            call: the number of this call, from 0.
            calls: how many calls there are. The steps that they sample to are spread evenly over the trajectory.
            to_the_end: whether to sample the whole trajectory instead.
            checkpointing: whether to use gradient checkpointing.

        Raises:
            RanOut: memory was not enough.
        """
        frames, rows, columns = self.size.latents
        noise = torch.randn(1, frames, 16, rows, columns, device=self.device, dtype=self.dtype)
        stop_after = self.sampling_steps if to_the_end else int((call + 0.5) / calls * self.sampling_steps)
        step: PublishedStep | None = None
        try:
            step = self.published_step(checkpointing=checkpointing)
            step.step(noise, 1)
            synchronize(self.device)
            passes, start = _PassCounter(step.original, step.trained), time.perf_counter()
            step.step(noise, stop_after)
            synchronize(self.device)
        except torch.OutOfMemoryError:
            raise RanOut("building the models" if step is None else step.phase) from None
        return StepCost(passes.count, time.perf_counter() - start)

    def run_ours(self, cache: TeacherCache, *, low_rank: bool = True, **options: Any) -> StepCost:
        """Builds the model, takes one of our steps to warm up, and measures the next `OUR_STEPS`.

        Args:
            cache: made by `make_cache`.
            low_rank: whether the localization loss is the low-rank one.
            options: further fields of `TrainingOptions`.

        Raises:
            RanOut: memory was not enough.
        """
        times: list[float] = []
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(trainer, "Terms", Terms if low_rank else _DenseTerms),
            contextlib.redirect_stderr(io.StringIO()),  # hides progress bars
        ):
            training = replace(self.training, max_train_steps=1 + OUR_STEPS, **options)
            try:
                model = random_model(self.size, self.device, self.dtype)
                passes = _PassCounter(*model.experts)
                train(model, cache, folder, training, on_step=lambda *_: times.append(time.perf_counter()))
            except (torch.OutOfMemoryError, MemoryError):
                raise RanOut("the student") from None
        return StepCost(passes.count / (1 + OUR_STEPS), (times[-1] - times[0]) / OUR_STEPS)


def check(runner: StepRunner) -> float:
    """Compares both steps' attention maps, losses and gradients, at points of a teacher cache.

    Returns:
        The largest relative difference.

    Raises:
        Disagreement: it exceeds the `TOLERANCE` of the model's dtype.
    """
    step = runner.published_step()
    with torch.no_grad():
        for eraser in step.erasers.values():
            nn.init.normal_(eraser.up.weight, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        runner.make_cache(Path(folder), 1)
        cache = TeacherCache.open(folder)
        target, kept = (cache.groups[name].rows([len(cache.groups[name]) // 2]) for name in ("target", "kept"))
    return max(_check_losses(runner, step, target, kept), _check_maps(runner, step, target))


def _check_losses(runner: StepRunner, step: PublishedStep, target: Any, kept: Any) -> float:
    """Compares the losses and their gradients. Returns the largest relative difference."""
    if target.mask is None:
        raise Disagreement("teacher cache: expected masks at the target points, got none")
    x_t, x_t_kept = (points.x_t.to(runner.device, runner.dtype) for points in (target, kept))
    t, t_kept, mask = (x.to(runner.device) for x in (target.t, kept.t, target.mask))
    theirs = step.losses(x_t, t, mask, x_t_kept, t_kept)
    terms = Terms(runner.training, device=runner.device, dtype=runner.dtype)
    unlearning, localization = terms.target_losses(step.trained, step.erasers, target, ETA)
    ours = (unlearning, terms.preservation_loss(step.trained, kept), localization)
    tolerance = TOLERANCE[runner.dtype]
    differences = []
    for name, weight, our_loss, their_loss in zip(theirs._fields, step.weights, ours, theirs, strict=True):
        if our_loss is None:
            raise Disagreement(f"{name} loss: expected a loss of ours, got none")
        theirs_weighted = weight * their_loss
        difference = check_relative_difference(f"{name} loss", our_loss.detach(), theirs_weighted.detach(), tolerance)
        differences.append(difference)
        gradient, their_gradient = (_flat_gradient(loss, step.parameters) for loss in (our_loss, theirs_weighted))
        difference = check_relative_difference(f"gradient of the {name} loss", gradient, their_gradient, tolerance)
        differences.append(difference)
    return max(differences)


def _flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters, retain_graph=True)])


def _check_maps(runner: StepRunner, step: PublishedStep, target: Any) -> float:
    """Compares the attention maps. Returns the largest relative difference."""
    x_t, t = target.x_t.to(runner.device, runner.dtype), target.t.to(runner.device)
    ours: dict[str, Tensor] = {}
    with torch.no_grad(), AttnMapsCapture(step.trained, ours):
        step.trained(x_t, t, target.condition["encoder_hidden_states"].to(runner.device))
    theirs = step.maps(x_t, t)
    return max(
        check_relative_difference("attention maps", our_map, their_map, TOLERANCE[runner.dtype])
        for our_map, their_map in zip(ours.values(), theirs.values(), strict=True)
    )
