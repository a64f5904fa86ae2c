"""The options of every phase, as data: the command line is made of them, and the phases take them.

A field's name is the option's, its metadata the help. Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal


def _option(help: str, default: Any = MISSING) -> Any:
    """A field that the command line shows with `help`; required without a default."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PrepareOptions:
    """Asks the frozen model, at points of trajectories, what training wants to know, and keeps it in a cache."""

    pretrained_model_name_or_path: str = _option("the pipeline: a folder, or a name on the Hub")
    output_dir: Path = _option("the cache: a new folder, or one to go on with")
    concept: str = _option("what to erase, as the target prompts have it")
    target_prompts: Path | None = _option("prompts with the concept, one a line; after a tab, one without it", None)
    kept_prompts: Path | None = _option("prompts for what is to stay as it is, one a line", None)
    data: Path | None = _option(
        "take points from these videos instead: NAME.txt beside NAME.mp4, .gif or .safetensors", None
    )
    negative_prompt: str = _option("what sampling leads away from, and stands for the concept's absence", "")
    num_trajectories: int = _option("sampled for the target prompts, and as many for the kept ones", 32)
    timesteps_per_trajectory: int = _option("points taken of each", 5)
    num_inference_steps: int = _option("of sampling", 50)
    guidance_scale: float | None = _option("of sampling; the pipeline's default if left out", None)
    height: int | None = _option("in pixels; the pipeline's default if left out", None)
    width: int | None = _option("in pixels; the pipeline's default if left out", None)
    num_frames: int | None = _option("the pipeline's default if left out", None)
    batch_size: int = _option("trajectories that go through the model at a time", 1)
    mask_threshold: float = _option("of the concept's attention map, from 0 to 1, for a token to be in the mask", 0.5)
    mask_layers: tuple[int, ...] = _option("attention layers that make the map, counted from 0; all if left out", ())
    mask_start: float = _option("part of the steps, from 0 to 1, after which attention is looked at", 0.5)
    seed: int = _option("of the trajectories", 0)
    mixed_precision: Literal["no", "fp16", "bf16"] = _option("what the model computes in, and the cache holds", "bf16")
    device: str | None = _option("as torch names it; a GPU if there is one", None)
    estimate: bool = _option("print size, forward passes and memory, and do nothing", False)

    def __post_init__(self) -> None:
        _check_sampling(self)
        for name in ("num_trajectories", "timesteps_per_trajectory", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)
        if not 0 <= self.mask_threshold <= 1:
            raise ValueError(f"mask_threshold: expected a number from 0 to 1, got {self.mask_threshold!r}")
        if not 0 <= self.mask_start < 1:
            raise ValueError(f"mask_start: expected a number from 0 to below 1, got {self.mask_start!r}")
        if not self.concept.strip():
            raise ValueError(f"concept: expected one or more words, got {self.concept!r}")


@dataclass(frozen=True)
class TargetGroup:
    """Points of the cache that the erasers learn to turn away from.

    Attributes:
        name: of the group in the cache.
        guidance_scale: eta, how far beyond `v_uncond` the target lies, seen from `v_cond`.
        share: of the steps, relative to the other groups' shares.
    """

    name: str = "target"
    guidance_scale: float = 7.5
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ValueError(f"share: expected a positive number, got {self.share!r}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale: expected a finite number, got {self.guidance_scale!r}")


@dataclass(frozen=True)
class TrainingOptions:
    """Trains erasers from a teacher cache; under `accelerate launch` or `torchrun`, on many processes."""

    pretrained_model_name_or_path: str = _option(
        "the pipeline that the cache was made with: a folder, or a name on the Hub"
    )
    cache_dir: Path = _option("what prepare wrote")
    output_dir: Path = _option("where checkpoints, logs and, in erasers/, the result go")
    rank: int = _option("inner width of the erasers", 128)
    max_train_steps: int = _option("steps of the optimizer", 500)
    train_batch_size: int = _option(
        "target points, and as many kept ones, that a process takes through the model at a time", 1
    )
    gradient_accumulation_steps: int = _option("such batches a step", 1)
    learning_rate: float = _option("peak learning rate", 1e-4)
    bias_learning_rate: float | None = _option("the biases' own; the same if left out", None)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = _option("shape of the learning rate", "constant_with_warmup")
    lr_warmup_steps: int = _option("steps in which it rises from 0", 20)
    lr_num_cycles: int = _option("restarts of cosine_with_restarts", 1)
    lr_power: float = _option("power of polynomial", 1.0)
    optimizer: Literal["adamw", "muon"] = _option("muon is for matrices; biases then have AdamW", "adamw")
    adam_beta1: float = _option("AdamW's", 0.9)
    adam_beta2: float = _option("AdamW's", 0.95)
    adam_weight_decay: float = _option("AdamW's, and Muon's", 1e-4)
    adam_epsilon: float = _option("AdamW's", 1e-8)
    max_grad_norm: float = _option("gradients are clipped to this norm; 0: not at all", 1.0)
    unlearning_weight: float = _option("of the loss that turns target points away from the concept", 1.0)
    preservation_weight: float = _option("of the loss that keeps the kept points as they were", 0.5)
    localization_weight: float = _option("of the mean square of what erasers change outside the mask", 1.0)
    negative_guidance_scale: float = _option("how far beyond the velocity without the concept the target lies", 7.5)
    loss_type: Literal["l2", "l1"] = _option("squared errors or absolute ones", "l2")
    mask_unlearning: bool = _option("turn away inside the mask only, not in the whole video", False)
    mixed_precision: Literal["no", "fp16", "bf16"] = _option(
        "what the frozen model computes in; erasers stay float32", "bf16"
    )
    gradient_checkpointing: bool = _option(
        "compute activations again in the backward pass: less memory, more time", False
    )
    sequential_terms: bool = _option("target points backward before kept ones forward: half the activations", False)
    fsdp: bool = _option("divide the frozen model over the processes; as accelerate launch --use_fsdp does", False)
    seed: int = _option("of the erasers and of the order of the points", 0)
    checkpointing_steps: int = _option("steps between checkpoints", 100)
    checkpoints_total_limit: int | None = _option("how many to keep; all if left out", None)
    resume_from_checkpoint: str | None = _option('a checkpoint, or "latest": the newest in output_dir, if any', None)
    report_to: Literal["tensorboard", "wandb", "all"] | None = _option(
        "where metrics go besides the progress bar", None
    )
    logging_dir: Path | None = _option("for TensorBoard; output_dir/logs if left out", None)
    device: str | None = _option("as torch names it; Accelerate's choice if left out", None)

    def __post_init__(self) -> None:
        for name in (
            "rank",
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
        ):
            _check_at_least(name, getattr(self, name), 1)
        _check_seed(self.seed)
        for name in ("lr_warmup_steps", "max_grad_norm", "adam_weight_decay", "lr_num_cycles"):
            _check_at_least(name, getattr(self, name), 0)
        for name in ("unlearning_weight", "preservation_weight", "localization_weight", "learning_rate"):
            _check_at_least(name, getattr(self, name), 0)
        if self.checkpoints_total_limit is not None:
            _check_at_least("checkpoints_total_limit", self.checkpoints_total_limit, 1)
        if not math.isfinite(self.negative_guidance_scale):
            raise ValueError(f"negative_guidance_scale: expected a finite number, got {self.negative_guidance_scale!r}")


@dataclass(frozen=True)
class EvaluateOptions:
    """Measures erasers in velocity space, on prompts and seeds that they were not trained with."""

    pretrained_model_name_or_path: str = _option("the pipeline: a folder, or a name on the Hub")
    erasers: tuple[Path, ...] = _option("folders of erasers, to measure together")
    output_dir: Path = _option("where evaluation.json, evaluation.png and the cache go")
    concept: str | None = _option("what they erase, as target prompts have it; needed without cache_dir", None)
    target_prompts: Path | None = _option("held-out prompts with the concept, one a line", None)
    kept_prompts: Path | None = _option("held-out prompts without it", None)
    cache_dir: Path | None = _option("what prepare wrote for such prompts; made in output_dir if left out", None)
    eraser_scales: tuple[float, ...] = _option("strength of each folder's erasers; 1 if left out", ())
    negative_prompt: str = _option("what the concept's absence is measured by", "")
    num_trajectories: int = _option("sampled for the target prompts, and as many for the kept ones", 8)
    timesteps_per_trajectory: int = _option("points taken of each", 10)
    num_inference_steps: int = _option("of sampling", 50)
    guidance_scale: float | None = _option("of sampling; the pipeline's default if left out", None)
    height: int | None = _option("in pixels; the pipeline's default if left out", None)
    width: int | None = _option("in pixels; the pipeline's default if left out", None)
    num_frames: int | None = _option("the pipeline's default if left out", None)
    batch_size: int = _option("points, or trajectories, that go through the model at a time", 1)
    seed: int = _option("of the trajectories; another than prepare's", 1000)
    mixed_precision: Literal["no", "fp16", "bf16"] = _option("what the model computes in", "bf16")
    device: str | None = _option("as torch names it; a GPU if there is one", None)

    def __post_init__(self) -> None:
        _check_scales(self.erasers, self.eraser_scales)
        _check_sampling(self)
        for name in ("num_trajectories", "timesteps_per_trajectory", "batch_size"):
            _check_at_least(name, getattr(self, name), 1)
        if self.cache_dir is None:
            for name in ("concept", "target_prompts", "kept_prompts"):
                if not getattr(self, name):
                    raise ValueError(f"{name}: expected where there is no cache_dir")


@dataclass(frozen=True)
class SampleOptions:
    """Makes videos without and with erasers, from the same noise."""

    pretrained_model_name_or_path: str = _option("the pipeline: a folder, or a name on the Hub")
    output_dir: Path = _option("where the videos go")
    erasers: tuple[Path, ...] = _option("folders of erasers, to use together")
    prompt: tuple[str, ...] = _option("what to show; a video each", ())
    prompts: Path | None = _option("more of them, one a line of a file", None)
    eraser_scales: tuple[float, ...] = _option("strength of each folder's erasers; 1 if left out", ())
    before: bool = _option("leave out the videos without erasers", True)
    negative_prompt: str = _option("what to lead away from", "")
    num_inference_steps: int = _option("of sampling", 50)
    guidance_scale: float | None = _option("of the prompt over the negative one; the pipeline's if left out", None)
    height: int | None = _option("in pixels; the pipeline's default if left out", None)
    width: int | None = _option("in pixels; the pipeline's default if left out", None)
    num_frames: int | None = _option("the pipeline's default if left out", None)
    seed: int = _option("of the noise; the same for every prompt", 0)
    fps: int | None = _option("frames a second; the pipeline's default if left out", None)
    format: Literal["mp4", "gif"] = _option("of the videos", "mp4")
    mixed_precision: Literal["no", "fp16", "bf16"] = _option("what the model computes in", "bf16")
    device: str | None = _option("as torch names it; a GPU if there is one", None)

    def __post_init__(self) -> None:
        _check_scales(self.erasers, self.eraser_scales)
        if not self.prompt and self.prompts is None:
            raise ValueError("prompt: expected a prompt, or a file of prompts as prompts")
        _check_sampling(self)
        if self.fps is not None:
            _check_at_least("fps", self.fps, 1)


def _check_scales(erasers: tuple[Path, ...], scales: tuple[float, ...]) -> None:
    if not erasers:
        raise ValueError("erasers: expected at least one folder")
    if scales and len(scales) != len(erasers):
        raise ValueError(f"eraser_scales: expected one for each of {len(erasers)} folders, got {len(scales)}")
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"eraser_scales: expected finite numbers, got {scale!r}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:  # of a larger one torch's generator on the CPU reads 32 bits, so that two are one
        raise ValueError(f"seed: expected a number from 0 to below 2^32, got {seed!r}")


def _check_sampling(options: PrepareOptions | EvaluateOptions | SampleOptions) -> None:
    _check_seed(options.seed)
    _check_at_least("num_inference_steps", options.num_inference_steps, 1)
    for name in ("height", "width", "num_frames"):
        if getattr(options, name) is not None:
            _check_at_least(name, getattr(options, name), 1)
    if options.guidance_scale is not None and not math.isfinite(options.guidance_scale):
        raise ValueError(f"guidance_scale: expected a finite number, got {options.guidance_scale!r}")


def _check_at_least(name: str, value: float, least: int) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")
