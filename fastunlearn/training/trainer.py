"""The training of erasers from a teacher cache.

A step is two passes of the student, one at target points and one at points to keep, and no pass of the teacher, whose
answers are in the cache. Only erasers train: float32 parameters, whatever the base model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastunlearn.training import checkpoints, parallel
from fastunlearn.training.batches import Batches
from fastunlearn.training.cache import TeacherCache
from fastunlearn.training.compatibility import check_made_with
from fastunlearn.training.files import writable
from fastunlearn.training.memory import explained_out_of_memory
from fastunlearn.training.optimization import ErasersOptimizer, LearningRateFactor, learning_rate_factor
from fastunlearn.training.options import TargetGroup, TrainingOptions
from fastunlearn.training.pipelines import load_model
from fastunlearn.training.placement import model_dtype, usable_device
from fastunlearn.training.run_settings import RunSettings
from fastunlearn.training.terms import TERMS, Terms
from fastunlearn.training.video_model import Erasers, VideoModel

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


def run(options: TrainingOptions) -> TrainingSummary:
    """Opens the cache, loads the transformers of the model it was made with, and trains.

    Raises:
        FileNotFoundError: there is no cache, or no pipeline.
        ValueError, OSError, MemoryError, FloatingPointError: as `train` raises them.
    """
    output_dir = writable(Path(options.output_dir))
    cache = TeacherCache.open(options.cache_dir)
    accelerator = parallel.accelerator_of(options, output_dir, cpu=parallel.is_cpu(options.device))
    device = accelerator.device
    if options.device is not None and accelerator.num_processes == 1:
        device = usable_device(options.device)
    sharded = parallel.fsdp_plugin(options) is not None and accelerator.num_processes > 1
    with explained_out_of_memory(options):
        model = load_model(
            options.pretrained_model_name_or_path,
            dtype=model_dtype(options.mixed_precision),
            device="cpu" if sharded else device,
        )
    try:
        summary = train(model, cache, output_dir, options)
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        print(f"wrote {summary.erasers}")
    return summary


def train(
    model: VideoModel,
    cache: TeacherCache,
    output_dir: Path | str,
    options: TrainingOptions,
    *,
    targets: Sequence[TargetGroup] | None = None,
    kept: str = "kept",
    lr_lambda: LearningRateFactor | None = None,
    on_step: OnStep | None = None,
) -> TrainingSummary:
    """Attaches erasers to `model` and trains them; they are attached when it returns.

    The same seed gives the same erasers on the same machine, also where the run was interrupted and resumed. With
    several processes, and with accumulation, they are those of one process with a batch as large as all together, but
    for rounding.

    Metrics of a step, averaged over its batch and all processes: "loss", which is the sum of "unlearning_loss",
    "preservation_loss" and "localization_loss", all weighted; "gradient_norm", before clipping; "learning_rate"; and
    under float16 "loss_scale".

    Args:
        model: whose erasers to train. Has no erasers yet. Its dtype is what the student computes in.
        cache: of the same model.
        output_dir: gets `erasers`, the result, and `checkpoint-N`.
        options: of training. Those about what to load and from where are not read.
        targets: the cache's groups to turn away from, by default "target" with `options.negative_guidance_scale`.
        kept: the cache's group to keep as it is.
        lr_lambda: what the learning rates of a step, counted from 0, are multiplied by, in place of
            `options.lr_scheduler`.
        on_step: is called after every step with the number of steps done and the step's metrics, on the main process.

    Raises:
        ValueError: the cache is of another model or lacks points; a run that is to be resumed is another one or its
            checkpoint is damaged; `output_dir` holds checkpoints and none is resumed.
        FileNotFoundError: there is no such checkpoint.
        OSError: a checkpoint cannot be written. Earlier ones are untouched.
        FloatingPointError: a loss or gradient is not finite. Nothing of that step reached the erasers.
        MemoryError: there is too little memory; says what would help.
    """
    check_made_with(cache.facts, model)
    if targets is None:
        targets = (TargetGroup(guidance_scale=options.negative_guidance_scale),)
    output_dir = writable(Path(output_dir))
    logging_dir = output_dir / "logs" if options.logging_dir is None else Path(options.logging_dir)
    plugin = parallel.fsdp_plugin(options)
    on_cpu = parallel.is_cpu(options.device) or (plugin is None and model.device.type == "cpu")
    accelerator = parallel.accelerator_of(options, logging_dir, cpu=on_cpu)
    with explained_out_of_memory(options):
        trainer = _Trainer(
            model=model,
            cache=cache,
            output_dir=output_dir,
            options=options,
            targets=targets,
            kept=kept if options.preservation_weight else None,
            factor=learning_rate_factor(options) if lr_lambda is None else lr_lambda,
            accelerator=accelerator,
            plugin=plugin,
        )
    if options.report_to is not None:
        config = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in asdict(options).items()
        }
        accelerator.init_trackers("fastunlearn", config=config)
    try:
        with explained_out_of_memory(options):
            return trainer.train(on_step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


class _Trainer:
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
        processes = accelerator.num_processes
        sharded = plugin is not None and processes > 1
        device, dtype = accelerator.device if sharded else model.device, model.dtype
        share = 1 / options.gradient_accumulation_steps
        self._terms = Terms(options, device=device, dtype=dtype, share=share)
        points = options.train_batch_size * options.gradient_accumulation_steps * processes
        self._batches = Batches(cache.groups, targets, kept, size=points, seed=options.seed)
        self._settings = RunSettings(
            options, targets, kept, points=points, cache=cache.fingerprint, dtype=str(dtype), factor=factor
        )

        self._resumed = self._checkpoint_to_resume()
        self._erasers = self._attach()
        experts = [[p for eraser in layers.values() for p in eraser.parameters()] for layers in self._erasers]
        if sharded:
            for expert, parameters in zip(model.experts, experts, strict=True):
                parallel.shard(expert, parameters, plugin, device)
        if options.gradient_checkpointing or (plugin is not None and plugin.activation_checkpointing):
            model.enable_gradient_checkpointing()
        self._optimizer = ErasersOptimizer(
            experts, options, factor, processes=processes, losses=len(TERMS), dtype=dtype
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
