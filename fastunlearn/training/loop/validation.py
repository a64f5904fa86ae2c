"""Measures erasure and drift while training goes on, at points of the cache that it never trains on.

A measurement takes at most `POINTS` target points and as many kept ones. They stay the same, so that what changes from
one measurement to the next is the erasers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunlearn.files import shown
from fastunlearn.training.evaluation.metrics import Ratio, Sums, drift, erasure
from fastunlearn.training.loop.batches import LEAST_TRAJECTORIES
from fastunlearn.training.loop.measurements import VALIDATION, Measured, metrics, read, write
from fastunlearn.training.options import TrainingOptions
from fastunlearn.training.random_numbers import random_generator
from fastunlearn.velocity_model import VelocityModel

# With 25 steps of one target and one kept point between measurements, they take a tenth of the time: a forward pass per
# point, against three or, with gradient checkpointing, four.
POINTS = 8
# A run that ends above this has not erased: at 0.28, 95% of the demo's videos still showed the concept, as before.
NOT_ERASED = 0.3
# Good erasers of the demo's model stay near 0.02, which is also what rounding to half precision makes.
DRIFTED = 0.1


class Validation:
    """Measures at held-out points, and keeps the measurements in `validation.json`.

    All processes have to call `start` and `after` alike: each measures a part of the points, and with a sharded model
    all must run as many forward passes.

    Args:
        cache: the teacher cache.
        held_out: the points that are never trained on, as `hold_out` returns them.
        targets: the names of the groups of target points.
        kept: the name of the group of kept points, or None not to measure drift.
        options: the options of training.
        experts: the model's transformers, with their erasers.
        device: the device of the model.
        dtype: the dtype that it computes in.
        accelerator: Accelerate's `Accelerator`.
        folder: the folder of the run.
        resumed_at: the number of steps that the run was resumed after; None if it is new.

    Raises:
        ValueError: the measurements of the run to resume are damaged.
    """

    def __init__(
        self,
        cache: Any,
        held_out: Mapping[str, Tensor],
        targets: Sequence[str],
        kept: str | None,
        options: TrainingOptions,
        *,
        experts: Sequence[VelocityModel],
        device: torch.device,
        dtype: torch.dtype,
        accelerator: Any,
        folder: Path,
        resumed_at: int | None,
    ) -> None:
        self._groups, self._options, self._accelerator = cache.groups, options, accelerator
        self._experts, self._device, self._dtype = experts, device, dtype
        self._folder = folder
        names = {"erasure": list(dict.fromkeys(targets)), "drift": [] if kept is None else [kept]}
        self._rows = {name: _spread(cache.groups, groups, held_out, options.seed) for name, groups in names.items()}
        self._is_on = bool(options.validation_share and options.validation_steps)
        self.measurements: list[Measured] = []
        if self._is_on and accelerator.is_main_process:
            _warn_of_small_groups([name for some in names.values() for name in some if name not in held_out])
        self._is_on = self._is_on and any(self._rows.values())
        if resumed_at is not None:
            self.measurements = [one for one in read(folder) if one.step <= resumed_at] if self._is_on else []
        elif accelerator.is_main_process:
            (folder / VALIDATION).unlink(missing_ok=True)

    def start(self, step: int) -> dict[str, float]:
        """Measures before the next step, after `step` of them, unless the run that is resumed did."""
        if self.measurements and self.measurements[-1].step == step:
            return {}
        return self._measure(step) if self._is_on else {}

    def after(self, step: int) -> dict[str, float]:
        """Measures after a step if it is one of every `validation_steps`, or the last one.

        Returns:
            The metrics as measured and smoothed, by name; none if nothing was measured.

        Raises:
            FloatingPointError: a velocity is not finite.
        """
        options = self._options
        is_due = self._is_on and (step % options.validation_steps == 0 or step == options.max_train_steps)
        return self._measure(step) if is_due else {}

    def shown(self) -> dict[str, str]:
        """The latest smoothed metrics as a progress bar shows them."""
        latest = metrics(self.measurements)[-1] if self.measurements else {}
        names = {"smoothed_erasure_coefficient": "erasure", "smoothed_preserved_drift": "drift"}
        return {shown: f"{latest[name]:.3f}" for name, shown in names.items() if name in latest}

    def finish(self) -> None:
        """Warns if the last measurement says that the concept is not erased, or that other prompts have changed."""
        if not self.measurements or not self._accelerator.is_main_process:
            return
        _, coefficient, change = self.measurements[-1]
        if coefficient is not None and coefficient > NOT_ERASED:
            warnings.warn(
                f"validation: expected an erasure coefficient of at most {NOT_ERASED:g} at held-out points, got "
                f"{coefficient:.2f}: the concept is not erased; look at masks.png in the cache's folder, because wrong "
                "masks are the likeliest cause, then try more --max-train-steps, a larger --learning-rate, or a "
                "smaller --localization-weight",
                stacklevel=4,
            )
        if change is not None and change > DRIFTED:
            warnings.warn(
                f"validation: expected a drift of at most {DRIFTED:g} at held-out points of kept prompts, got "
                f"{change:.2f}: other videos have changed too; try a larger --preservation-weight, a smaller "
                "--learning-rate, a --negative-guidance-scale nearer to 0, or more kept prompts",
                stacklevel=4,
            )

    @torch.no_grad()
    def _measure(self, step: int) -> dict[str, float]:
        ratios = {"erasure": Ratio(), "drift": Ratio(root=True)}
        for name, ratio in ratios.items():
            for t, *sums in self._gathered(name):
                if not all(map(math.isfinite, sums)):
                    raise FloatingPointError(
                        f"step {step}: the velocity at a held-out point at timestep {t:g} is not finite; the model "
                        f"overflows in {self._dtype}, or the learning rate is too large"
                    )
                ratio.add(torch.tensor([t]), Sums(*(torch.tensor([value], dtype=torch.float64) for value in sums)))
        self.measurements.append(Measured(step, ratios["erasure"].total, ratios["drift"].total))
        if self._accelerator.is_main_process:
            points = {name: sum(map(len, rows.values())) for name, rows in self._rows.items()}
            write(self._folder, self.measurements, points["erasure"], points["drift"])
        return metrics(self.measurements)[-1]

    def _gathered(self, metric: str) -> list[tuple[float, float, float]]:
        """The timestep and both sums of every point of a metric, from all processes."""
        from accelerate.utils import gather_object

        own = []
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        for group, rows in self._rows[metric].items():
            experts = self._groups[group].experts[rows]
            for expert in experts.unique().tolist():
                batches = rows[experts == expert].split(self._options.train_batch_size)
                for start in range(0, len(batches), processes):
                    # A process that has no batch left repeats the last: a sharded model needs all of them.
                    sums = self._sums(metric, group, expert, batches[min(start + index, len(batches) - 1)])
                    if start + index < len(batches):
                        own += sums
        return gather_object(own) if processes > 1 else own

    def _sums(self, metric: str, group: str, expert: int, rows: Tensor) -> list[tuple[float, float, float]]:
        points = self._groups[group].rows(rows)
        condition = {name: value.to(self._device) for name, value in points.condition.items()}
        velocity = self._experts[expert](points.x_t.to(self._device, self._dtype), points.t, condition)
        v_uncond, v_cond = (v.to(self._device, velocity.dtype) for v in (points.v_uncond, points.v_cond))
        sums = erasure(velocity, v_uncond, v_cond) if metric == "erasure" else drift(velocity, v_cond)
        return list(zip(points.t.tolist(), *(values.tolist() for values in sums), strict=True))


def _spread(
    groups: Mapping[str, Any], names: Sequence[str], held_out: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """At most `POINTS` held-out rows of some groups together, by group, spread evenly over the timesteps."""
    rows = [(name, row) for name in names if name in held_out for row in held_out[name].nonzero()[:, 0].tolist()]
    # Drawn at random where several points have a timestep, or they could all be of one trajectory.
    order = torch.randperm(len(rows), generator=random_generator(seed, "validation", *names)).tolist()
    ordered = sorted((rows[index] for index in order), key=lambda row: float(groups[row[0]].t[row[1]]))
    count = min(POINTS, len(ordered))
    chosen = [ordered[number * (len(ordered) - 1) // max(1, count - 1)] for number in range(count)]
    found = {name: sorted(row for group, row in chosen if group == name) for name in names}
    return {name: torch.tensor(numbers) for name, numbers in found.items() if numbers}


def _warn_of_small_groups(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"validation: expected at least {LEAST_TRAJECTORIES} trajectories in a group, to hold one out, got fewer "
            f"in {' and '.join(map(shown, names))}, where erasure or drift is therefore not watched; prepare more "
            "trajectories, or set validation_share to 0",
            stacklevel=6,
        )
