"""The training loop: draws points, takes optimizer steps, writes checkpoints, and resumes from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastunlearn.families import EXPERTS, Condition
from fastunlearn.files import refuse_links, remove_folder, subfolder
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.loop import checkpoints, processes, record
from fastunlearn.training.loop.batches import Batches, Draw, hold_out
from fastunlearn.training.loop.checkpoints import ERASERS
from fastunlearn.training.loop.measurements import Measured
from fastunlearn.training.loop.optimizer import ErasersOptimizer, LearningRateFactor
from fastunlearn.training.loop.run_settings import RunSettings
from fastunlearn.training.loop.terms import TERMS, Terms
from fastunlearn.training.loop.units import Units, measure_units, scale_initial_weights
from fastunlearn.training.loop.validation import Validation
from fastunlearn.training.loop.validation_videos import ValidationVideos, refuse_sharded_model
from fastunlearn.training.model.video_model import Erasers, VideoModel
from fastunlearn.training.options import TargetGroup, TrainingOptions

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingSummary:
    """The result of a training run.

    Attributes:
        erasers: the folder of the trained erasers.
        steps: the number of steps that they were trained for, including those before the run was resumed.
        resumed_from: the checkpoint that the run was resumed from.
        metrics: the metrics of the last step; empty if no steps were left.
        measurements: those at held-out points, including the ones before the run was resumed.
    """

    erasers: Path
    steps: int
    resumed_from: Path | None
    metrics: dict[str, float]
    measurements: tuple[Measured, ...] = ()


def refuse_earlier_run(output_dir: Path, options: TrainingOptions) -> None:
    """Raises FileExistsError if the folder holds an earlier run, which is neither to be resumed nor overwritten.

    Also if there is a symbolic link where the trained erasers will be written, hours later.
    """
    refuse_links(output_dir, ERASERS, *(f"{ERASERS}/{expert}" for expert in EXPERTS))
    if options.overwrite_output_dir or options.resume_from_checkpoint is not None:
        return
    if earlier := checkpoints.existing(output_dir):
        raise FileExistsError(
            f"output_dir: expected a folder without checkpoints, but {output_dir} holds {earlier[-1].name} of an "
            "earlier run; go on from it with resume_from_checkpoint latest, choose another output_dir, or replace that "
            "run with overwrite_output_dir"
        )
    if (output_dir / ERASERS).exists():
        raise _erasers_exist(output_dir, "")


def _erasers_exist(output_dir: Path, how: str) -> FileExistsError:
    return FileExistsError(
        f"output_dir: expected a folder without trained erasers, but {output_dir / ERASERS} holds those of an earlier "
        f"run{how}; choose another output_dir, or replace them with overwrite_output_dir"
    )


class Trainer:
    """The state of a training run: model, batches, losses, optimizer and checkpoints.

    Args:
        model: the model to train erasers on; it has none yet.
        cache: the teacher cache.
        output_dir: the folder for checkpoints and the trained erasers.
        options: the options of training.
        targets: the groups of target points.
        kept: the group of kept points. At a preservation weight of 0 they are not trained on, only measured.
        factor: the factor of the learning rate, by step.
        accelerator: Accelerate's `Accelerator`.
        plugin: Accelerate's settings for FSDP2, or None not to shard the model.
        validation_conditions: the conditions of the prompts to sample while training, by prompt.

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
        kept: str,
        factor: LearningRateFactor,
        accelerator: Any,
        plugin: Any,
        validation_conditions: Mapping[str, Condition] | None = None,
    ) -> None:
        self._model, self._cache, self._options = model, cache, options
        self._output_dir, self._accelerator = output_dir, accelerator
        self._kept = kept if options.preservation_weight else None
        num_processes = accelerator.num_processes
        is_sharded = plugin is not None and num_processes > 1
        device, dtype = accelerator.device if is_sharded else model.device, model.dtype
        points = options.train_batch_size * options.gradient_accumulation_steps * num_processes
        held_out = hold_out(cache.groups, options.validation_share, options.seed)
        self._batches = Batches(
            cache.groups,
            targets,
            self._kept,
            size=points,
            seed=options.seed,
            held_out=held_out,
            negative_share=options.kept_negative_share,
        )
        self._settings = RunSettings(
            options, targets, self._kept, points=points, cache=cache.fingerprint, dtype=str(dtype), factor=factor
        )
        self._resumed = self._checkpoint_to_resume()
        self._last_checkpoint = None if self._resumed is None else self._resumed.path
        self._erasers = self._attach_erasers()
        parameters = [[p for eraser in layers.values() for p in eraser.parameters()] for layers in self._erasers]
        if is_sharded:
            for expert, eraser_parameters in zip(model.experts, parameters, strict=True):
                processes.shard(expert, eraser_parameters, plugin, device)
        if options.gradient_checkpointing or (plugin is not None and plugin.activation_checkpointing):
            model.enable_gradient_checkpointing()
        units = self._measure_units(targets)
        self._terms = Terms(options, units, device=device, dtype=dtype, scale=1 / options.gradient_accumulation_steps)
        self._optimizer = ErasersOptimizer(
            self._erasers, options, units, factor, processes=num_processes, losses=len(TERMS), dtype=dtype
        )
        self._restore_optimizer()
        self._videos: ValidationVideos | None = None
        if validation_conditions is not None and options.validation_prompt:
            refuse_sharded_model(is_sharded)
            if accelerator.is_main_process:
                self._videos = ValidationVideos(model, validation_conditions, cache.facts, options, output_dir)
        self._validation = Validation(
            cache,
            held_out,
            [target.name for target in targets],
            kept if kept in cache.groups else None,
            options,
            experts=model.experts,
            device=device,
            dtype=dtype,
            accelerator=accelerator,
            folder=output_dir,
            resumed_at=None if self._resumed is None else self._resumed.step,
        )

    def _checkpoint_to_resume(self) -> checkpoints.Checkpoint | None:
        options, folder = self._options, self._output_dir
        refuse_earlier_run(folder, options)
        if options.resume_from_checkpoint is None:
            self._remove_checkpoints()
            return None
        path = checkpoints.find(folder, options.resume_from_checkpoint)
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (path,) = broadcast_object_list([path])
        if path is None:
            self._check_repeats_run()
            return None
        checkpoint = checkpoints.read(path)
        if checkpoint.step > options.max_train_steps:
            raise ValueError(
                f"max_train_steps: expected at least {checkpoint.step}, because {path} has had {checkpoint.step} steps "
                f"already, got {options.max_train_steps}"
            )
        checkpoints.check_same_run(checkpoint, self._settings.after(checkpoint.step))
        return checkpoint

    def _remove_checkpoints(self) -> None:
        """Removes those of the run that this one replaces: it must not be mistaken for this one, nor resumed."""
        if self._accelerator.is_main_process:
            for path in checkpoints.existing(self._output_dir):
                remove_folder(path)

    def _check_repeats_run(self) -> None:
        """Raises FileExistsError if the folder has no checkpoint to resume, but the erasers of a run with others."""
        erasers = self._output_dir / ERASERS
        if erasers.exists():
            earlier = record.read(erasers)
            if earlier is None or earlier.settings != self._settings.after(self._options.max_train_steps):
                raise _erasers_exist(self._output_dir, " with other settings and no checkpoint to resume")

    def _attach_erasers(self) -> list[Erasers]:
        """Attaches new erasers, or those of the checkpoint to resume. Returns them per transformer."""
        if self._resumed is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._options.seed)
                return self._model.attach_erasers(self._options.rank)
        try:
            (loaded,) = self._model.load_erasers(self._resumed.erasers).values()
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"checkpoint {self._resumed.path} is damaged: {error}") from error
        return loaded

    def _measure_units(self, targets: Sequence[TargetGroup]) -> Units | None:
        options = self._options
        if not options.relative:
            return None
        units = measure_units(
            self._model,
            self._erasers,
            self._cache,
            targets,
            loss_type=options.loss_type,
            batch_size=options.train_batch_size,
        )
        if self._accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            # Other GPUs may round differently; other learning rates there would drive the processes' erasers apart.
            (units,) = broadcast_object_list([units])
        if self._resumed is None:
            scale_initial_weights(self._erasers, units)
        return units

    def _restore_optimizer(self) -> None:
        if self._resumed is not None:
            try:
                self._optimizer.load_state_dict(self._resumed.state)
            except ValueError as error:
                raise ValueError(f"{self._resumed.path / checkpoints.STATE}: {error}") from error

    def train(self, on_step: OnStep | None) -> TrainingSummary:
        """Takes the remaining steps and writes the trained erasers.

        Args:
            on_step: is called on the main process after every step, with the number of steps done and the metrics.
        """
        from tqdm import tqdm

        options, is_main = self._options, self._accelerator.is_main_process
        first = 0 if self._resumed is None else self._resumed.step
        metrics: dict[str, float] = {}
        with tqdm(
            total=options.max_train_steps, initial=first, desc="training erasers", unit="step", disable=not is_main
        ) as bar:
            self._accelerator.log(self._validation.start(first), step=first)
            for step in range(first, options.max_train_steps):
                metrics = self._step(step) | self._validation.after(step + 1)
                bar.set_postfix(loss=f"{metrics['loss']:.4g}", **self._validation.shown(), refresh=False)
                bar.update()
                self._accelerator.log(metrics, step=step + 1)
                if on_step is not None and is_main:
                    on_step(step + 1, metrics)
                if (step + 1) % options.checkpointing_steps == 0:
                    self._save_checkpoint(step + 1)
                if self._videos is not None and self._videos.is_due(step + 1):
                    self._videos.write(step + 1)
        self._optimizer.drop_gradients()
        erasers = self._output_dir / ERASERS
        if is_main:
            self._save_erasers(subfolder(self._output_dir, ERASERS), options.max_train_steps)
            if self._videos is not None and first < options.max_train_steps:  # now that the erasers are safe
                self._videos.write(options.max_train_steps)
        self._accelerator.wait_for_everyone()
        self._validation.finish()
        resumed_from = None if self._resumed is None else self._resumed.path
        return TrainingSummary(
            erasers, options.max_train_steps, resumed_from, metrics, tuple(self._validation.measurements)
        )

    def _step(self, step: int) -> dict[str, float]:
        """Takes one optimizer step and returns its metrics."""
        draw = self._batches.draw(step)
        self._optimizer.start(draw.expert)
        for rows in self._own_batches():
            self._backward(draw, rows)
        losses: dict[str, float] = {}

        def check(values: list[float], norm: float | None) -> None:
            losses.update(zip(TERMS, values, strict=True))
            self._check_finite(step, {f"{term} loss": value for term, value in losses.items()})
            if norm is not None:
                self._check_finite(step, {"gradient's norm": norm})

        metrics = self._optimizer.finish(step, check)
        return {"loss": sum(losses.values())} | {f"{term}_loss": value for term, value in losses.items()} | metrics

    def _own_batches(self) -> Iterator[slice]:
        """Yields this process's batches as slices of the step's points. The slices of all processes do not overlap."""
        size, num_processes = self._options.train_batch_size, self._accelerator.num_processes
        for batch in range(self._options.gradient_accumulation_steps):
            start = (batch * num_processes + self._accelerator.process_index) * size
            yield slice(start, start + size)

    def _backward(self, draw: Draw, rows: slice) -> None:
        """Adds the gradients of one batch."""
        student, erasers = self._model.experts[draw.expert], self._erasers[draw.expert]
        target = self._cache.groups[draw.target.name].rows(draw.target_rows[rows])
        unlearning, localization = self._terms.target_losses(
            student, erasers, target, draw.target.guidance_scale, draw.expert
        )
        if self._kept is None:
            self._optimizer.backward([unlearning, None, localization])
            return
        kept = self._cache.groups[self._kept].rows(draw.kept_rows[rows], draw.kept_negative[rows])
        if self._options.sequential_terms:
            self._optimizer.backward([unlearning, None, localization])
            self._optimizer.backward([None, self._terms.preservation_loss(student, kept), None])
        else:
            self._optimizer.backward([unlearning, self._terms.preservation_loss(student, kept), localization])

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {step + 1}: the {name} is {value}; stopped before the erasers were updated. "
                    f"Last checkpoint: {self._last_checkpoint or 'none'}"
                )

    def _save_checkpoint(self, step: int) -> None:
        if self._accelerator.is_main_process:
            self._last_checkpoint = checkpoints.write(
                self._output_dir,
                step,
                lambda folder: self._save_erasers(folder, step),
                self._optimizer.state_dict(),
                self._settings.after(step),
                self._options.checkpoints_total_limit,
            )

    def _save_erasers(self, folder: Path, step: int) -> None:
        self._model.save_erasers(folder, concept=self._cache.facts.get("concept"))
        record.write(folder, self._settings.after(step), self._cache)
