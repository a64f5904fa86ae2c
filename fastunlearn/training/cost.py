"""What the commands cost on published models: computed from the models' sizes, not measured.

    python -m fastunlearn.training.cost

At batch size 1, with weights in bfloat16 and the commands' default options:

* A forward pass of S tokens through P parameters in L blocks of D features takes 2 P S + 4 L D S^2 operations.
* `prepare` makes two passes per sampling step, with the prompt and without (classifier-free guidance); for a
  guidance-distilled model it makes one, and one more without the prompt at every point it stores. It makes a further
  one at the points of a target trajectory, with the prompt in which the concept is replaced; on a trajectory that
  follows that prompt, the further one has the target prompt instead, also at every step of which the attention is
  recorded. It holds the text encoders, frees them, and then holds the transformers and the activations of a pass.
* A training step is two passes of the student, each about three forward passes with gradient checkpointing: forward,
  forward again, and backward to the activations (the frozen weights need no gradient). A pass keeps the input of every
  block, S D L numbers, and the hidden states of the erasers, N r L numbers for N video tokens at rank r. The outputs of
  the erasers, N D L numbers, are never kept. Erasers, their gradients and Adam's two moments take 16 bytes per
  parameter.
* Before the first step, every `--validation-steps` steps and at the end, `train` makes a forward pass at each of the
  held-out points that it watches.
* With `--sequential-terms` the activations of one student pass are held at a time, instead of those of both.

Several processes share the trajectories of `prepare`, which are independent. In `train`, they all-reduce the erasers'
gradients once per step (the last column of the table). `--fsdp` shards the weights, but not the activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fastunlearn.families import FAMILIES
from fastunlearn.families.base import PublishedModel
from fastunlearn.training.cache.estimate import ACTIVATIONS_PER_FEATURE
from fastunlearn.training.cache.plan import Plan
from fastunlearn.training.data.prompts import PromptLine
from fastunlearn.training.data.requests import Request, target_requests
from fastunlearn.training.loop.validation import POINTS as HELD_OUT_POINTS
from fastunlearn.training.options import PrepareOptions, TrainingOptions

# An assumption: 40% of the 989 TFLOP/s that an H100 has in dense bfloat16.
H100_OPERATIONS_PER_SECOND = 400e12
_BFLOAT16, _FLOAT32 = 2, 4  # bytes


class Cost(NamedTuple):
    """The cost of one model: bytes, operations, forward passes, and hours on one H100."""

    weights: float
    forward: float
    prepare_memory: float
    prepare_hours: float
    train_memory: float
    sequential_memory: float
    train_hours: float
    cached_point: float
    gradients: float


def cost_of(model: PublishedModel, *, has_guidance: bool) -> Cost:
    """The cost of `prepare` and `train` with their default options and `--gradient-checkpointing`.

    Args:
        model: its sizes.
        has_guidance: whether a sampling step takes two passes (classifier-free guidance).
    """
    tokens = model.video_tokens + model.text_tokens
    forward = 2 * model.parameters * tokens + 4 * model.blocks * model.features * tokens**2
    weights = _BFLOAT16 * model.transformers * model.parameters
    at_work = _BFLOAT16 * tokens * model.features * ACTIVATIONS_PER_FEATURE

    options = PrepareOptions("", Path(), "nude")
    requests = target_requests([PromptLine("a nude person")], options)
    requests += [Request("a person", "kept")] * options.num_trajectories
    passes = Plan(requests, options, 6.0 if has_guidance else 1.0, {"target"}).num_forwards
    encoders = _BFLOAT16 * model.text_encoder_parameters

    rank = TrainingOptions.rank
    eraser_parameters = model.blocks * (2 * rank * model.features + rank + model.features)
    kept = _BFLOAT16 * model.blocks * (tokens * model.features + model.video_tokens * rank)
    held = weights + 4 * _FLOAT32 * model.transformers * eraser_parameters + at_work
    measurements = 1 + TrainingOptions.max_train_steps // TrainingOptions.validation_steps
    train_forwards = TrainingOptions.max_train_steps * 2 * 3 + measurements * 2 * HELD_OUT_POINTS
    return Cost(
        weights=weights,
        forward=forward,
        prepare_memory=max(encoders, weights + (2 if has_guidance else 1) * at_work),
        prepare_hours=passes * forward / H100_OPERATIONS_PER_SECOND / 3600,
        train_memory=held + 2 * kept,
        sequential_memory=held + kept,
        train_hours=train_forwards * forward / H100_OPERATIONS_PER_SECOND / 3600,
        cached_point=_BFLOAT16 * 3 * model.latent_elements,
        gradients=_FLOAT32 * eraser_parameters,
    )


def table() -> str:
    """The costs of every published model, as text: memory, hours on one H100, and sizes of what is stored and sent."""
    lines = [
        "model, size of a video       prepare            train                         disk per  gradients",
        "                             memory    time     memory  sequential*  time     point     per step",
    ]
    for family in FAMILIES:
        for model in family.published:
            cost = cost_of(model, has_guidance=family.guidance_scale != 1)
            lines.append(
                f"{f'{model.name}, {model.video}':<29}{_gb(cost.prepare_memory):<8}{cost.prepare_hours:>5.1f} h   "
                f"{_gb(cost.train_memory):<8}{_gb(cost.sequential_memory):<11}{cost.train_hours:>5.1f} h   "
                f"{cost.cached_point / 1e6:>4.1f} MB   {cost.gradients / 1e6:>4.0f} MB"
            )
    lines.append("* with --sequential-terms")
    return "\n".join(lines)


def _gb(count: float) -> str:
    return f"{count / 1e9:>3.0f} GB"


if __name__ == "__main__":
    print(table())
