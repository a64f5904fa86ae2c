"""The settings that a run's result depends on: a resumed run must share them with the interrupted one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from fastunlearn.training.loop.optimizer import LearningRateFactor
from fastunlearn.training.options import TargetGroup, TrainingOptions


class RunSettings:
    """The settings of a run, as JSON values.

    Args:
        options: the options of training. Those that are free on resume are left out.
        targets: the groups of target points.
        kept: the group of kept points, if any.
        points: the number of target points, and of kept points, per step, over all processes. How they are divided into
            processes and batches is free.
        cache: the fingerprint of the cache.
        dtype: the dtype that the model computes in.
        factor: the factor of the learning rate, by step.
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
        settings = {
            option.name: getattr(options, option.name)
            for option in fields(options)
            if not option.metadata["free_on_resume"]
        }
        settings |= {"targets": [asdict(target) for target in targets], "kept": kept, "points a step": points}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings | {"cache": cache, "dtype": dtype}))
        self._factor = factor

    def after(self, steps: int) -> dict[str, Any]:
        """Returns the settings after some steps, with a digest of their learning rates; later ones are still free."""
        factors = repr([float(self._factor(step)) for step in range(steps)])
        digest = hashlib.sha256(factors.encode()).hexdigest()[:12]
        return self._settings | {"learning rates so far (lr_scheduler, lr_warmup_steps, max_train_steps)": digest}
