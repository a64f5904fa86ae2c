"""The options of the four commands, as dataclasses.

The command line is built from these classes, and the commands take their instances: to add an option, add a field. The
name of the field is the option's name; its metadata holds the help text, the heading that `--help` lists it under, the
check of its value, and whether a resumed run may change it. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastunlearn.files import shown
from fastunlearn.training import option_fields as shared
from fastunlearn.training.option_fields import (
    below_1,
    check_fields,
    each,
    expand_homes,
    has_words,
    is_count,
    is_count_or_0,
    is_fraction,
    is_rate,
    is_scale,
    is_seed,
    is_size,
    is_weight,
    option,
    whole,
    within,
)


@dataclass(frozen=True)
class PrepareOptions:
    """Runs the frozen model and stores what training needs in a cache: latents, velocities and masks of the concept."""

    pretrained_model_name_or_path: str = shared.pipeline()
    output_dir: Path = option("folder of the cache: a new folder, or an unfinished cache to complete", group="data")
    concept: str = option("the concept to erase, worded as in the target prompts", group="data", check=has_words)
    recipe: Path | None = shared.recipe()
    target_prompts: Path | None = option(
        "file of prompts with the concept, one per line; after a tab, optionally the prompt that replaces it",
        None,
        group="data",
    )
    kept_prompts: Path | None = option(
        "file of prompts, one per line, for which the model must stay as it is", None, group="data"
    )
    data: Path | None = option(
        "folder of your own videos, instead of prompts: NAME.mp4, .mov, .gif ... or .safetensors, with NAME.txt",
        None,
        group="data",
    )
    replacement: str = shared.replacement()
    baseline: Literal["replacement", "negative"] = shared.baseline()
    negative_prompt: str = shared.negative_prompt()
    follow_replacement: float = option(
        "share of the target trajectories, from 0 to 1, whose sampling follows the replacement instead of the prompt, "
        "as the erased model will",
        0.5,
        group="sampling",
        check=is_fraction,
    )
    num_trajectories: int = shared.num_trajectories(32)
    timesteps_per_trajectory: int = shared.timesteps_per_trajectory(5)
    num_inference_steps: int = shared.num_inference_steps()
    guidance_scale: float | None = shared.guidance_scale()
    height: int | None = shared.height()
    width: int | None = shared.width()
    num_frames: int | None = shared.num_frames()
    batch_size: int = option(
        "trajectories per forward pass of the model; fewer take less memory", 1, group="memory", check=is_size
    )
    mask_threshold: float = option(
        "least attention to the concept, from 0 to 1, of a token that is in the mask",
        0.5,
        group="masks",
        check=is_fraction,
    )
    mask_layers: tuple[int, ...] = option(
        "attention layers that masks are computed from, counted from 0; all layers if left out",
        (),
        group="masks",
        check=each(is_count_or_0),
    )
    mask_start: float = option(
        "fraction of the sampling steps to skip before attention is recorded, from 0 to below 1",
        0.5,
        group="masks",
        check=below_1,
    )
    seed: int = option("random seed of the trajectories", 0, group="sampling", check=is_seed)
    mixed_precision: Literal["no", "fp16", "bf16"] = shared.mixed_precision(
        "precision of the model and the cache, where no means float32"
    )
    device: str | None = shared.device()
    estimate: bool = option(
        "only print how much disk, how many forward passes and how much memory it would take", False, group="memory"
    )

    trust_remote_code: bool = shared.trust_remote_code()

    def __post_init__(self) -> None:
        expand_homes(self)
        check_fields(self)


@dataclass(frozen=True)
class TargetGroup:
    """A group of the cache's points at which the erasers learn to turn away from the concept.

    Attributes:
        name: the name of the group in the cache.
        guidance_scale: eta, how far the target velocity lies beyond `v_uncond`, seen from `v_cond`.
        share: how often a step trains on this group, relative to the shares of the other groups.
    """

    name: str = "target"
    guidance_scale: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        within(1e-6, 1e6)("share", self.share)
        is_scale("guidance_scale", self.guidance_scale)


@dataclass(frozen=True)
class TrainingOptions:
    """Trains erasers from a teacher cache, on one process or, under `accelerate launch` or `torchrun`, on several."""

    # A resumed run may name another model folder, because the cache is checked against the model.
    pretrained_model_name_or_path: str = shared.pipeline(
        "the pipeline that the cache was made with: a folder, a name on the Hub, or demo", free_on_resume=True
    )
    # A resumed run may move the cache, because its content is compared.
    cache_dir: Path = option("folder of the cache that prepare wrote", group="data", free_on_resume=True)
    output_dir: Path = option(
        "folder for the trained erasers (in its subfolder erasers), checkpoints and logs",
        group="data",
        free_on_resume=True,
    )
    recipe: Path | None = shared.recipe()
    rank: int = option("inner width of the erasers", 128, group="model", check=is_size)
    # The number of points per step and the learning rates so far must stay the same. `RunSettings` compares those, so
    # that the options which determine them may change.
    max_train_steps: int = option(
        "optimizer steps in total", 500, group="optimization", check=is_count, free_on_resume=True
    )
    train_batch_size: int = option(
        "number of target points, and of kept points, per forward pass and process",
        1,
        group="optimization",
        check=is_size,
        free_on_resume=True,
    )
    gradient_accumulation_steps: int = option(
        "number of batches whose gradients are accumulated for an optimizer step",
        1,
        group="optimization",
        check=is_size,
        free_on_resume=True,
    )
    learning_rate: float = option(
        "peak learning rate: change of an eraser's output per step, relative to the attention's output",
        0.1,
        group="optimization",
        check=is_rate,
    )
    bias_learning_rate: float | None = option(
        "peak learning rate of the biases; the same as --learning-rate if left out",
        None,
        group="optimization",
        check=is_rate,
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option(
        "schedule of the learning rate, as in diffusers",
        "linear",
        group="optimization",
        free_on_resume=True,
    )
    lr_warmup_steps: int = option(
        "optimizer steps over which the learning rate rises from 0",
        20,
        group="optimization",
        check=is_count_or_0,
        free_on_resume=True,
    )
    lr_num_cycles: int = option(
        "number of cycles of the schedule cosine_with_restarts",
        1,
        group="optimization",
        check=is_count_or_0,
        free_on_resume=True,
    )
    lr_power: float = option(
        "exponent of the schedule polynomial", 1.0, group="optimization", check=within(0, 100), free_on_resume=True
    )
    relative: bool = option(
        "take learning rates and losses as they are, not relative to the model's own outputs",
        True,
        group="optimization",
    )
    optimizer: Literal["adamw", "muon"] = option(
        "optimizer of the matrices; biases always use AdamW", "adamw", group="optimization"
    )
    adam_beta1: float = option("beta1 of AdamW", 0.9, group="optimization", check=below_1)
    adam_beta2: float = option("beta2 of AdamW", 0.95, group="optimization", check=below_1)
    adam_weight_decay: float = option("weight decay of AdamW and Muon", 1e-4, group="optimization", check=is_rate)
    adam_epsilon: float = option("epsilon of AdamW", 1e-8, group="optimization", check=within(1e-30, 1))
    max_grad_norm: float = option(
        "gradients are clipped to this norm; 0 turns clipping off", 1.0, group="optimization", check=is_weight
    )
    unlearning_weight: float = option(
        "weight of the loss that turns the model away from the concept", 1.0, group="losses", check=is_weight
    )
    preservation_weight: float = option(
        "weight of the loss that holds the model to the frozen one",
        1.0,
        group="losses",
        check=is_weight,
    )
    kept_negative_share: float = option(
        "share of the kept points, from 0 to 1, that have the negative prompt instead of their own, so that guidance "
        "leads away from the same velocity as before",
        0.25,
        group="losses",
        check=is_fraction,
    )
    localization_weight: float = option(
        "weight of the loss on what the erasers change outside the mask", 0.1, group="losses", check=is_weight
    )
    # `RunSettings` compares the guidance scale of every target group instead.
    negative_guidance_scale: float = option(
        "how far beyond the velocity without the concept the target lies: eta; in the paper 7.5",
        0.0,
        group="losses",
        check=is_scale,
        free_on_resume=True,
    )
    loss_type: Literal["l2", "l1"] = option("penalty on errors, squared or absolute", "l2", group="losses")
    mask_unlearning: bool = option(
        "apply the unlearning loss inside the mask only; to the whole video if left out", False, group="losses"
    )
    # `RunSettings` compares the dtype of the loaded model instead.
    mixed_precision: Literal["no", "fp16", "bf16"] = shared.mixed_precision(
        "precision of the frozen model, where no means float32", free_on_resume=True
    )
    gradient_checkpointing: bool = option(
        "recompute activations in the backward pass: less memory, more time", False, group="memory", free_on_resume=True
    )
    sequential_terms: bool = option(
        "run the target points backward before the kept points forward: half the activations",
        False,
        group="memory",
        free_on_resume=True,
    )
    fsdp: bool = option(
        "shard the frozen model over the processes (FSDP2), as accelerate launch --use_fsdp does",
        False,
        group="memory",
        free_on_resume=True,
    )
    seed: int = option(
        "random seed of the erasers' initial weights and of the order of the points",
        0,
        group="optimization",
        check=is_seed,
    )
    checkpointing_steps: int = option(
        "optimizer steps between checkpoints",
        100,
        group="checkpoints",
        check=is_count,
        free_on_resume=True,
    )
    checkpoints_total_limit: int | None = option(
        "how many of the newest checkpoints to keep; all if left out",
        None,
        group="checkpoints",
        check=is_count,
        free_on_resume=True,
    )
    validation_share: float = option(
        "share of every group's trajectories, from 0 to 0.5, that is never trained on but measured; with 0, all are "
        "trained on and nothing is watched",
        0.1,
        group="validation",
        check=within(0, 0.5),
    )
    validation_steps: int = option(
        "optimizer steps between measurements of erasure and drift, each of up to 16 forward passes (at batch size 1, "
        "a tenth of the time of 25 steps); 0 measures nothing",
        25,
        group="validation",
        check=is_count_or_0,
        free_on_resume=True,
    )
    validation_prompt: tuple[str, ...] = option(
        "prompts to sample at every checkpoint and at the end, without and with the erasers, as pictures in "
        "output_dir/validation; needs memory for the VAE",
        (),
        group="validation",
        free_on_resume=True,
    )
    validation_inference_steps: int = option(
        "sampling steps of these videos", 20, group="validation", check=is_size, free_on_resume=True
    )
    resume_from_checkpoint: str | None = option(
        "checkpoint to resume: a name, a path, or latest for the newest one in output_dir, if any",
        None,
        group="checkpoints",
        free_on_resume=True,
        is_path=True,
    )
    overwrite_output_dir: bool = shared.overwrite_output_dir(
        "start anew in an output_dir with an earlier run, whose checkpoints are deleted first",
        "checkpoints",
        free_on_resume=True,
    )
    report_to: Literal["tensorboard", "wandb", "all"] | None = option(
        "tracker to log metrics to, if any", None, group="logging", free_on_resume=True
    )
    logging_dir: Path | None = option(
        "folder of the trackers' logs; output_dir/logs if left out", None, group="logging", free_on_resume=True
    )
    device: str | None = shared.device(
        "torch device, such as cuda:1; the device that Accelerate chooses if left out", free_on_resume=True
    )

    trust_remote_code: bool = shared.trust_remote_code()

    def __post_init__(self) -> None:
        expand_homes(self)
        check_fields(self)
        points = self.train_batch_size * self.gradient_accumulation_steps
        if points > 2**20:
            raise ValueError(
                f"gradient_accumulation_steps: expected at most {2**20} points per optimizer step and process, got "
                f"{points}, which is train_batch_size times gradient_accumulation_steps"
            )
        if self.overwrite_output_dir and self.resume_from_checkpoint is not None:
            raise ValueError(
                "overwrite_output_dir: expected no resume_from_checkpoint beside it, got "
                f"{shown(self.resume_from_checkpoint)}; give one of them"
            )


@dataclass(frozen=True)
class EvaluateOptions:
    """Measures what erasers erase and what they keep, on prompts and seeds that they were not trained with."""

    pretrained_model_name_or_path: str = shared.pipeline()
    erasers: tuple[Path, ...] = shared.erasers()
    output_dir: Path = option("folder for evaluation.json, evaluation.png and the cache", group="data")
    concept: str | None = option(
        "the erased concept, worded as in the target prompts; required without --cache-dir", None, group="data"
    )
    target_prompts: Path | None = option(
        "file of held-out prompts with the concept, one per line; required without --cache-dir", None, group="data"
    )
    kept_prompts: Path | None = option(
        "file of held-out prompts without the concept, one per line; required without --cache-dir", None, group="data"
    )
    cache_dir: Path | None = option(
        "folder of a cache that prepare wrote for held-out prompts; made in output_dir if left out", None, group="data"
    )
    eraser_scales: tuple[float, ...] = shared.eraser_scales()
    replacement: str = shared.replacement()
    baseline: Literal["replacement", "negative"] = shared.baseline()
    negative_prompt: str = shared.negative_prompt()
    num_trajectories: int = shared.num_trajectories(8)
    timesteps_per_trajectory: int = shared.timesteps_per_trajectory(10)
    num_videos: int | None = option(
        "videos of target prompts to sample with the erasers, in which the frozen model looks for the concept; one per "
        "target trajectory if left out, none if 0. Each takes about 3.5 times as many passes as a trajectory",
        None,
        group="sampling",
        check=is_count_or_0,
    )
    num_inference_steps: int = shared.num_inference_steps()
    guidance_scale: float | None = shared.guidance_scale()
    height: int | None = shared.height()
    width: int | None = shared.width()
    num_frames: int | None = shared.num_frames()
    batch_size: int = option(
        "points, or trajectories, per forward pass of the model; fewer take less memory",
        1,
        group="memory",
        check=is_size,
    )
    overwrite_output_dir: bool = shared.overwrite_output_dir(
        "replace evaluation.json and evaluation.png in output_dir; its cache must be of the same prompts", "data"
    )
    seed: int = option(
        "random seed of the trajectories; use another one than for prepare", 1000, group="sampling", check=is_seed
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = shared.mixed_precision()
    device: str | None = shared.device()

    trust_remote_code: bool = shared.trust_remote_code()

    def __post_init__(self) -> None:
        expand_homes(self)
        _check_erasers(self.erasers, self.eraser_scales)
        check_fields(self)
        if self.cache_dir is None:
            for name in ("concept", "target_prompts", "kept_prompts"):
                if not getattr(self, name):
                    raise ValueError(
                        f"{name}: expected a value where there is no cache_dir, got {shown(getattr(self, name))}"
                    )


@dataclass(frozen=True)
class SampleOptions:
    """Generates videos without and with erasers, from the same noise, for comparison by eye."""

    pretrained_model_name_or_path: str = shared.pipeline()
    output_dir: Path = option("folder for the videos", group="output")
    erasers: tuple[Path, ...] = shared.erasers()
    prompt: tuple[str, ...] = option("one or more prompts; each becomes a video", (), group="prompts")
    prompts: Path | None = option("file of further prompts, one per line", None, group="prompts")
    eraser_scales: tuple[float, ...] = shared.eraser_scales()
    before: bool = option("leave out the videos without erasers", True, group="output")
    negative_prompt: str = option("negative prompt of sampling; empty if left out", "", group="prompts")
    num_inference_steps: int = shared.num_inference_steps()
    guidance_scale: float | None = shared.guidance_scale()
    height: int | None = shared.height()
    width: int | None = shared.width()
    num_frames: int | None = shared.num_frames()
    seed: int = option(
        "random seed of the noise, which is the same for every prompt", 0, group="sampling", check=is_seed
    )
    fps: int | None = option(
        "frames per second; the pipeline's default if left out", None, group="output", check=whole(1, 1000)
    )
    overwrite_output_dir: bool = shared.overwrite_output_dir("replace videos of the same names in output_dir", "output")
    format: Literal["mp4", "gif"] = option("file format of the videos", "mp4", group="output")
    mixed_precision: Literal["no", "fp16", "bf16"] = shared.mixed_precision()
    device: str | None = shared.device()

    trust_remote_code: bool = shared.trust_remote_code()

    def __post_init__(self) -> None:
        expand_homes(self)
        _check_erasers(self.erasers, self.eraser_scales)
        if not self.prompt and self.prompts is None:
            raise ValueError("prompt: expected at least one prompt, here or in a file given as prompts, got none")
        check_fields(self)


def _check_erasers(erasers: tuple[Path, ...], scales: tuple[float, ...]) -> None:
    if not erasers:
        raise ValueError("erasers: expected at least one folder, got none")
    if scales and len(scales) != len(erasers):
        raise ValueError(f"eraser_scales: expected one for each of {len(erasers)} folders, got {len(scales)}")
