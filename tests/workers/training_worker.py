"""A program for launchers: `training_worker.py OUTPUT CASE...` trains each case into the folder OUTPUT/CASE."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from training_cases import options_for, tiny_cache, tiny_model

from fastunlearn.training.loop import trainer
from fastunlearn.training.loop.batches import Batches
from fastunlearn.training.loop.units import Units, measure_units
from fastunlearn.training.options import TargetGroup
from fastunlearn.training.train import train

# With a large epsilon, the step of Adam is proportional to the gradient. With a small one, rounding errors in a tiny
# gradient become full steps.
_SMOOTH = {"adam_epsilon": 1e-2, "learning_rate": 0.1, "max_grad_norm": 0.01, "max_train_steps": 3}
# In five steps, both of two transformers have a turn.
_WATCHED = {
    "relative": True,
    "validation_share": 0.25,
    "validation_steps": 2,
    "learning_rate": 1.0,
    "max_train_steps": 5,
}
CASES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "not-finite": {},
    "accumulating": {"family": "hunyuan_video", "gradient_accumulation_steps": 2},
    "two-transformers": {"family": "wan", "experts": 2, "sequential_terms": True},
    "watched": _WATCHED,
    "sharded": {"fsdp": True},
    "sharded-checkpointing": {"family": "hunyuan_video", "fsdp": True, "gradient_checkpointing": True},
    "sharded-sequential": {"family": "wan", "experts": 2, "fsdp": True, "sequential_terms": True},
    "sharded-watched": _WATCHED | {"family": "wan", "experts": 2, "fsdp": True},
}


def train_case(output: Path, case: str, batch: int, **changes: Any) -> list[float]:
    """Trains one of the cases and returns the losses."""
    options = _SMOOTH | CASES[case] | changes | {"train_batch_size": batch}
    family, experts = options.pop("family", "cogvideox"), options.pop("experts", 1)
    model = tiny_model(family, experts=experts)
    cache = tiny_cache(model)
    if case == "not-finite":  # at a point that only the second process has, in the second step
        bad = Batches(cache.groups, [TargetGroup()], "kept", size=2, seed=0).draw(1).kept_rows[1]
        cache.groups["kept"].points.v_cond[bad] = math.nan
    if options.get("relative") and os.environ.get("RANK", "0") != "0":  # a GPU that rounds differently, very much so
        trainer.measure_units = lambda *of, **how: _doubled(measure_units(*of, **how))  # type: ignore[assignment]
    losses: list[float] = []
    train(model, cache, output, options_for(output, **options), on_step=lambda _, m: losses.append(m["loss"]))  # type: ignore[arg-type]
    sharded = [isinstance(p, DTensor) for x in model.experts for n, p in x.named_parameters() if ".erasers." not in n]
    is_distributed = torch.distributed.is_initialized()
    should_shard = options.get("fsdp") or "ACCELERATE_USE_FSDP" in os.environ
    assert all(sharded) if should_shard and is_distributed else not any(sharded)
    return losses


def _doubled(units: Units) -> Units:
    layers = [{layer: 2 * size for layer, size in sizes.items()} for sizes in units.layers]
    return Units(2 * units.velocity, layers)


if __name__ == "__main__":
    folder, *cases = sys.argv[1:]
    for chosen in cases:
        output = Path(folder) / chosen
        try:
            train_case(output, chosen, batch=1)
        except FloatingPointError as error:
            (output / f"stopped-{os.environ['RANK']}").write_text(str(error))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
