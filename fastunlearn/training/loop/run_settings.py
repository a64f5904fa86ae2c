"""What a run's result depends on: what must be as it was when the run goes on from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from fastunlearn.training.loop.optimizer import LearningRateFactor
from fastunlearn.training.options import TargetGroup, TrainingOptions

# Options that do not change what a run arrives at, or that `RunSettings` describes in another way.
_FREE = {
    "pretrained_model_name_or_path",  # the cache is checked against the model
    "cache_dir",
    "output_dir",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "negative_guidance_scale",
    "mixed_precision",
    "gradient_checkpointing",
    "sequential_terms",
    "fsdp",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "logging_dir",
    "device",
}


class RunSettings:
    """The settings of a run, as JSON has them.

    Args:
        options: of training.
        targets: the groups of target points.
        kept: the group of kept points, if any.
        points: of each sort in a step, over all processes. How many processes and batches share them is free.
        cache: its fingerprint.
        dtype: what the model computes in.
        factor: of the learning rate, by step.
    """

    def __init__(
        self,
        options: TrainingOptions,
        targets: Sequence[TargetGroup],
        kept: str | None,
        *,
        points: int,
        cache: str,
        dtype: str,
        factor: LearningRateFactor,
    ) -> None:
        settings = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _FREE}
        settings |= {"targets": [asdict(target) for target in targets], "kept": kept, "points a step": points}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings | {"cache": cache, "dtype": dtype}))
        self._factor = factor

    def after(self, step: int) -> dict[str, Any]:
        """The settings, with the learning rates of `step` steps: the rest of the schedule is still free."""
        factors = repr([float(self._factor(done)) for done in range(step)])
        digest = hashlib.sha256(factors.encode()).hexdigest()[:12]
        return self._settings | {"learning rates so far (lr_scheduler, lr_warmup_steps, max_train_steps)": digest}
