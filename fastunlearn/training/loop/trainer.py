"""The training loop: draws points, takes optimizer steps, writes checkpoints, and goes on from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.loop import checkpoints, processes
from fastunlearn.training.loop.batches import Batches
from fastunlearn.training.loop.optimizer import ErasersOptimizer, LearningRateFactor
from fastunlearn.training.loop.run_settings import RunSettings
from fastunlearn.training.loop.terms import TERMS, Terms
from fastunlearn.training.model.video_model import Erasers, VideoModel
from fastunlearn.training.options import TargetGroup, TrainingOptions

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingSummary:
    """What came of a training.

    Attributes:
        erasers: the folder of the trained erasers.
        steps: how many steps they were trained, those before a resumption included.
        resumed_from: the checkpoint that the run went on from.
        metrics: of the last step; empty if there was none to do.
    """

    erasers: Path
    steps: int
    resumed_from: Path | None
    metrics: dict[str, float]


class Trainer:
    """The state of a training: model, batches, losses, optimizer and checkpoints.

    Raises: as `fastunlearn.training.train.train` does.
    """

    def __init__(
        self,
        *,
        model: VideoModel,
        cache: TeacherCache,
        output_dir: Path,
        options: TrainingOptions,
        targets: Sequence[TargetGroup],
        kept: str | None,
        factor: LearningRateFactor,
        accelerator: Any,
        plugin: Any,
    ) -> None:
        self._model, self._cache, self._options = model, cache, options
        self._output_dir, self._accelerator = output_dir, accelerator
        self._kept = kept
        num_processes = accelerator.num_processes
        sharded = plugin is not None and num_processes > 1
        device, dtype = accelerator.device if sharded else model.device, model.dtype
        share = 1 / options.gradient_accumulation_steps
        self._terms = Terms(options, device=device, dtype=dtype, share=share)
        points = options.train_batch_size * options.gradient_accumulation_steps * num_processes
        self._batches = Batches(cache.groups, targets, kept, size=points, seed=options.seed)
        self._settings = RunSettings(
            options, targets, kept, points=points, cache=cache.fingerprint, dtype=str(dtype), factor=factor
        )

        self._resumed = self._checkpoint_to_resume()
        self._erasers = self._attach()
        experts = [[p for eraser in layers.values() for p in eraser.parameters()] for layers in self._erasers]
        if sharded:
            for expert, parameters in zip(model.experts, experts, strict=True):
                processes.shard(expert, parameters, plugin, device)
        if options.gradient_checkpointing or (plugin is not None and plugin.activation_checkpointing):
            model.enable_gradient_checkpointing()
        self._optimizer = ErasersOptimizer(
            experts, options, factor, processes=num_processes, losses=len(TERMS), dtype=dtype
        )
        if self._resumed is not None:
            try:
                self._optimizer.load_state_dict(self._resumed.state)
            except ValueError as error:
                raise ValueError(f"{self._resumed.path / checkpoints.STATE}: {error}") from error
        self._last_checkpoint = None if self._resumed is None else self._resumed.path

    def _checkpoint_to_resume(self) -> checkpoints.Checkpoint | None:
        options, folder = self._options, self._output_dir
        if options.resume_from_checkpoint is None:
            if found := checkpoints.existing(folder):
                raise ValueError(
                    f"output_dir: {folder} holds {found[-1].name} of an earlier run; go on from it with "
                    "resume_from_checkpoint latest, or choose another output_dir"
                )
            return None
        path = checkpoints.find(folder, options.resume_from_checkpoint)
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (path,) = broadcast_object_list([path])
        if path is None:
            return None
        checkpoint = checkpoints.read(path)
        if checkpoint.step > options.max_train_steps:
            raise ValueError(
                f"max_train_steps: {path} has had {checkpoint.step} steps already, got {options.max_train_steps}"
            )
        checkpoints.check_same_run(checkpoint, self._settings.after(checkpoint.step))
        return checkpoint

    def _attach(self) -> list[Erasers]:
        if self._resumed is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._options.seed)
                return self._model.attach_erasers(self._options.rank)
        try:
            (loaded,) = self._model.load_erasers(self._resumed.erasers).values()
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"checkpoint {self._resumed.path} is damaged: {error}") from error
        return loaded

    def train(self, on_step: OnStep | None) -> TrainingSummary:
        """Does the steps that are left."""
        from tqdm import tqdm

        options, is_main = self._options, self._accelerator.is_main_process
        first = 0 if self._resumed is None else self._resumed.step
        metrics: dict[str, float] = {}
        with tqdm(
            total=options.max_train_steps, initial=first, desc="training erasers", unit="step", disable=not is_main
        ) as bar:
            for step in range(first, options.max_train_steps):
                metrics = self._step(step)
                bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
                bar.update()
                self._accelerator.log(metrics, step=step + 1)
                if on_step is not None and is_main:
                    on_step(step + 1, metrics)
                if (step + 1) % options.checkpointing_steps == 0:
                    self._save_checkpoint(step + 1)
        self._optimizer.drop_gradients()
        erasers = self._output_dir / "erasers"
        if is_main:
            self._save_erasers(erasers)
        self._accelerator.wait_for_everyone()
        return TrainingSummary(
            erasers, options.max_train_steps, None if self._resumed is None else self._resumed.path, metrics
        )

    def _step(self, step: int) -> dict[str, float]:
        draw = self._batches.draw(step)
        student, erasers = self._model.experts[draw.expert], self._erasers[draw.expert]
        self._optimizer.start(draw.expert)
        for part in self._parts():
            target = self._cache.groups[draw.target.name].rows(draw.target_rows[part])
            unlearning, localization = self._terms.of_target(student, erasers, target, draw.target.guidance_scale)
            if self._kept is None:
                self._optimizer.backward([unlearning, None, localization])
                continue
            kept = self._cache.groups[self._kept].rows(draw.kept_rows[part])
            if self._options.sequential_terms:
                self._optimizer.backward([unlearning, None, localization])
                self._optimizer.backward([None, self._terms.of_kept(student, kept), None])
            else:
                self._optimizer.backward([unlearning, self._terms.of_kept(student, kept), localization])
        losses: dict[str, float] = {}

        def check(values: list[float], norm: float | None) -> None:
            losses.update(zip(TERMS, values, strict=True))
            for name, value in [(f"{term} loss", value) for term, value in losses.items()] + [
                ("gradient's norm", norm)
            ]:
                if value is not None and not math.isfinite(value):
                    raise FloatingPointError(
                        f"step {step + 1}: the {name} is {value}; stopped before the erasers took it in. "
                        f"Last checkpoint: {self._last_checkpoint or 'none'}"
                    )

        facts = self._optimizer.finish(step, check)
        return {"loss": sum(losses.values())} | {f"{term}_loss": value for term, value in losses.items()} | facts

    def _parts(self) -> Iterator[slice]:
        """This process's batches among a step's points, such that several processes' are a larger batch of one."""
        size, processes = self._options.train_batch_size, self._accelerator.num_processes
        for batch in range(self._options.gradient_accumulation_steps):
            start = (batch * processes + self._accelerator.process_index) * size
            yield slice(start, start + size)

    def _save_checkpoint(self, step: int) -> None:
        if self._accelerator.is_main_process:
            self._last_checkpoint = checkpoints.write(
                self._output_dir,
                step,
                self._save_erasers,
                self._optimizer.state_dict(),
                self._settings.after(step),
                self._options.checkpoints_total_limit,
            )

    def _save_erasers(self, folder: Path) -> None:
        self._model.save_erasers(folder, concept=self._cache.facts.get("concept"))
