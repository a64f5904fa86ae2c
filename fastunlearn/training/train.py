"""`fastunlearn train`: trains erasers from a teacher cache.

A training step is two passes of the student, at target points and at kept points, and none of the teacher: its
velocities are in the cache. Only erasers train, in float32, whatever the base model computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastunlearn.devices import usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.files import writable
from fastunlearn.training.cache.provenance import check_cache_fits
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.loop import processes
from fastunlearn.training.loop.optimizer import LearningRateFactor, learning_rate_factor
from fastunlearn.training.loop.trainer import OnStep, Trainer, TrainingSummary
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import TargetGroup, TrainingOptions


def run(options: TrainingOptions) -> TrainingSummary:
    """Opens the cache, loads the transformers of the model it was made with, and trains.

    Raises:
        FileNotFoundError: there is no cache, or no pipeline.
        ValueError, OSError, MemoryError, FloatingPointError: as `train` raises them.
    """
    output_dir = writable(Path(options.output_dir))
    cache = TeacherCache.open(options.cache_dir)
    accelerator = processes.accelerator_of(options, output_dir, cpu=processes.is_cpu(options.device))
    device = accelerator.device
    if options.device is not None and accelerator.num_processes == 1:
        device = usable_device(options.device)
    sharded = processes.fsdp_plugin(options) is not None and accelerator.num_processes > 1
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
    check_cache_fits(cache.facts, model)
    if targets is None:
        targets = (TargetGroup(guidance_scale=options.negative_guidance_scale),)
    output_dir = writable(Path(output_dir))
    logging_dir = output_dir / "logs" if options.logging_dir is None else Path(options.logging_dir)
    plugin = processes.fsdp_plugin(options)
    on_cpu = processes.is_cpu(options.device) or (plugin is None and model.device.type == "cpu")
    accelerator = processes.accelerator_of(options, logging_dir, cpu=on_cpu)
    with explained_out_of_memory(options):
        trainer = Trainer(
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
