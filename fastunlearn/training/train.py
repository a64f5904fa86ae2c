"""`fastunlearn train`: trains erasers from a teacher cache.

A training step runs the student twice per batch, at target points and at kept points. It does not run the teacher,
whose velocities are in the cache. Only the erasers train; they are float32, whatever the dtype of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fastunlearn.devices import is_cpu, usable_device
from fastunlearn.dtypes import model_dtype
from fastunlearn.families import Condition
from fastunlearn.files import subfolder, writable
from fastunlearn.training.cache.provenance import check_cache_fits
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.recipe import target_groups
from fastunlearn.training.loop import measurements, processes
from fastunlearn.training.loop.optimizer import LearningRateFactor, learning_rate_factor
from fastunlearn.training.loop.trainer import OnStep, Trainer, TrainingSummary, refuse_earlier_run
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.memory import explained_out_of_memory
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import TargetGroup, TrainingOptions


def run(options: TrainingOptions) -> TrainingSummary:
    """Opens the cache, loads the transformers of the model that it was made with, and trains erasers.

    Raises:
        FileNotFoundError: there is no such cache or pipeline.
        ValueError, OSError, MemoryError, FloatingPointError: as for `train`. A folder with an earlier run is refused
            before the model is loaded.
    """
    output_dir = writable(options.output_dir)
    refuse_earlier_run(output_dir, options)
    cache = TeacherCache.open(options.cache_dir)
    accelerator = processes.connect(options, output_dir, cpu=is_cpu(options.device))
    device = accelerator.device
    if options.device is not None and accelerator.num_processes == 1:
        device = usable_device(options.device)
    targets = target_groups(options, cache.groups)
    is_sharded = processes.fsdp_plugin(options) is not None and accelerator.num_processes > 1
    conditions = _validation_conditions(options, cache, device) if options.validation_prompt else None
    with explained_out_of_memory(options):
        model = load_model(
            options.pretrained_model_name_or_path,
            dtype=model_dtype(options.mixed_precision),
            device="cpu" if is_sharded else device,
            vae=conditions is not None,
            trust_remote_code=options.trust_remote_code,
        )
    try:
        summary = train(model, cache, output_dir, options, targets=targets, validation_conditions=conditions)
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        if summary.measurements:
            print(measurements.summary(summary.measurements))
        print(f"wrote {summary.erasers}")
    return summary


def _validation_conditions(options: TrainingOptions, cache: TeacherCache, device: torch.device) -> dict[str, Condition]:
    """Encodes the prompts to sample and the cache's negative prompt, before the transformers take the memory."""
    with explained_out_of_memory(options):
        encoded = encode_prompts(
            options.pretrained_model_name_or_path,
            [*options.validation_prompt, cache.facts["negative_prompt"]],
            None,
            dtype=model_dtype(options.mixed_precision),
            device=device,
            trust_remote_code=options.trust_remote_code,
        )
    return {prompt: encoded_prompt.condition for prompt, encoded_prompt in encoded.items()}


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
    validation_conditions: Mapping[str, Condition] | None = None,
) -> TrainingSummary:
    """Attaches erasers to `model` and trains them. They stay attached.

    The same seed gives the same erasers on the same machine, even if the run is interrupted and resumed. Several
    processes, or gradient accumulation, give the erasers of one process with one batch of the total size, except for
    rounding.

    The metrics of a step are averages over its points and all processes: "loss", the sum of "unlearning_loss",
    "preservation_loss" and "localization_loss", which include their weights; "gradient_norm", before clipping;
    "learning_rate"; and, in float16, "loss_scale". At every `validation_steps`-th step and the last there are also the
    "erasure_coefficient" and "preserved_drift" at points that are never trained on, and both "smoothed_" over the
    last measurements. All of these are in `validation.json` in `output_dir`, too, from before the first step on.

    Warns if the concept is not erased at the end, or if kept prompts have changed.

    Args:
        model: the model to train erasers on; it has none yet. The student computes in its dtype.
        cache: a cache of the same model.
        output_dir: the folder for the trained erasers, `erasers`, and the checkpoints, `checkpoint-N`.
        options: the options of training. Those that say what to load, and from where, are not read.
        targets: the groups of the cache to turn away from; by default those of `options.recipe`, or else "target" with
            `options.negative_guidance_scale`.
        kept: the group of the cache to keep as it is.
        lr_lambda: the factor of the learning rates at a step, counted from 0, instead of `options.lr_scheduler`.
        on_step: is called on the main process after every step, with the number of steps done and the step's metrics.
        validation_conditions: the conditions of `options.validation_prompt` and of the cache's negative prompt, by
            prompt, as `encode_prompts` makes them. The model then needs its VAE. Without them nothing is sampled.

    Raises:
        ValueError: the cache is of another model, lacks points or has other groups than the recipe; the checkpoint to
            resume is damaged or of another run.
        FileExistsError: `output_dir` holds checkpoints or erasers of an earlier run, which is neither resumed nor to be
            overwritten. With "latest" and no checkpoint, erasers of a run with the same settings are made again.
        FileNotFoundError: there is no such checkpoint.
        OSError: a checkpoint cannot be written. Earlier ones are untouched.
        FloatingPointError: a loss or gradient is not finite. The erasers have not been updated with it.
        MemoryError: memory ran out; the message says what would help.
    """
    check_cache_fits(cache.facts, model, cache.condition_shapes)
    if targets is None:
        targets = target_groups(options, cache.groups)
    output_dir = writable(output_dir)
    logging_dir = output_dir / "logs" if options.logging_dir is None else Path(options.logging_dir)
    if options.report_to is not None and options.logging_dir is None:
        subfolder(output_dir, "logs")
    plugin = processes.fsdp_plugin(options)
    on_cpu = is_cpu(options.device) or (plugin is None and model.device.type == "cpu")
    accelerator = processes.connect(options, logging_dir, cpu=on_cpu)
    with explained_out_of_memory(options):
        trainer = Trainer(
            model=model,
            cache=cache,
            output_dir=output_dir,
            options=options,
            targets=targets,
            kept=kept,
            factor=learning_rate_factor(options) if lr_lambda is None else lr_lambda,
            accelerator=accelerator,
            plugin=plugin,
            validation_conditions=validation_conditions,
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
