"""How the demo erases a concept: the trajectories that `prepare` samples, and the options of `prepare` and `train`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from fastunlearn.demo.world import COLOURS, SHAPES, Noun, Nouns, prompt_of
from fastunlearn.training.data.requests import Request
from fastunlearn.training.options import PrepareOptions, TargetGroup, TrainingOptions

SAMPLING_STEPS = 12
# Groups of points: with the concept alone in the prompt, with another shape beside it, and without the concept.
ALONE, BESIDE, KEPT = "alone", "beside", "kept"
TRAJECTORIES = {ALONE: 12, BESIDE: 40, KEPT: 24}
LEADING_TRAJECTORIES = 8  # further trajectories in each of ALONE and BESIDE, sampled towards the concept
LEADING = (0.0, 0.5)  # points of these come from the first half of the steps: later, it is too late to turn away
UNPROMPTED_TRAJECTORIES = 6  # further trajectories in KEPT, whose points have the empty prompt
BATCH_SIZE = 24

RANK = 64
STEPS = 240
POINTS_PER_STEP = 12  # target points, and as many kept points
MATRICES_LEARNING_RATE = 3e-2  # with Muon, which needs half as many steps as AdamW for the same loss
BIASES_LEARNING_RATE = 1e-2
UNLEARNING_WEIGHT, PRESERVATION_WEIGHT, LOCALIZATION_WEIGHT = 1.0, 1.0, 0.004
# With another shape beside the concept, the target is the baseline velocity itself (guidance scale 0). A target beyond
# it would turn away from the other shape, too.
TARGETS = (
    TargetGroup(ALONE, guidance_scale=1.0, share=1.0),
    TargetGroup(BESIDE, guidance_scale=0.0, share=3.0),
)


def draw_one(shape: str, rng: random.Random) -> Nouns:
    """Draws a colour for one shape."""
    return (Noun(shape, rng.choice(list(COLOURS))),)


def draw_two(first: str, second: str, rng: random.Random) -> Nouns:
    """Draws different colours for two shapes, and their order."""
    nouns = [Noun(shape, colour) for shape, colour in zip((first, second), rng.sample(list(COLOURS), 2), strict=True)]
    rng.shuffle(nouns)
    return tuple(nouns)


def requests(concept: str, rng: random.Random) -> list[Request]:
    """Returns the requests for all trajectories of the teacher cache."""
    targets = [request for group in (ALONE, BESIDE) for request in target_requests(concept, group, rng)]
    return targets + list(kept_requests(concept, rng))


def target_requests(concept: str, group: str, rng: random.Random) -> Iterator[Request]:
    """Yields requests for trajectories whose points have the concept in their prompt, in the group ALONE or BESIDE.

    Some trajectories are sampled towards the concept, others towards a replacement for it: the erased model has to turn
    away on the frozen model's trajectories, and also on the ones that it will take itself. The replacement is the rest
    of the prompt or, if nothing is left, another shape. The empty prompt cannot replace the concept, because half of
    its videos show it.
    """
    others = [shape for shape in SHAPES if shape != concept]
    for number in range(LEADING_TRAJECTORIES + TRAJECTORIES[group]):
        other = others[number % 2]
        nouns = draw_one(concept, rng) if group == ALONE else draw_two(concept, other, rng)
        rest = tuple(noun for noun in nouns if noun.shape != concept) or draw_one(other, rng)
        if number < LEADING_TRAJECTORIES:
            yield Request(prompt_of(nouns), group, instead=prompt_of(rest), follow="prompt", steps=LEADING)
        else:
            yield Request(prompt_of(nouns), group, instead=prompt_of(rest), follow="instead")


def kept_requests(concept: str, rng: random.Random) -> Iterator[Request]:
    """Yields requests for trajectories towards other shapes. The points' prompt names these shapes, or is empty."""
    first, second = (shape for shape in SHAPES if shape != concept)
    for number in range(TRAJECTORIES[KEPT] + UNPROMPTED_TRAJECTORIES):
        nouns = draw_two(first, second, rng) if number % 2 == 0 else draw_one((first, second)[number // 2 % 2], rng)
        prompt = prompt_of(nouns)
        if number < TRAJECTORIES[KEPT]:
            yield Request(prompt, KEPT)
        else:
            yield Request("", KEPT, instead=prompt, follow="instead")


# The model and the folders are left blank below: `prepare` and `train` get them as arguments, not from their options.


def prepare_options(concept: str, seed: int) -> PrepareOptions:
    """Returns the options of `prepare`, which all other sampling and masks of the demo use as well."""
    return PrepareOptions(
        pretrained_model_name_or_path="",
        output_dir=Path(),
        concept=concept,
        timesteps_per_trajectory=SAMPLING_STEPS,
        num_inference_steps=SAMPLING_STEPS,
        batch_size=BATCH_SIZE,
        mask_threshold=0.45,
        mask_layers=(0,),  # attention to a word stays within its object; in later layers it spreads beyond
        mask_start=0.5,  # by then it is settled where the objects are
        seed=seed,
    )


def training_options(seed: int) -> TrainingOptions:
    """Returns the options of `train`, which also takes TARGETS and `learning_rate_factor`."""
    return TrainingOptions(
        pretrained_model_name_or_path="",
        cache_dir=Path(),
        output_dir=Path(),
        rank=RANK,
        max_train_steps=STEPS,
        train_batch_size=POINTS_PER_STEP,
        relative=False,
        learning_rate=MATRICES_LEARNING_RATE,
        bias_learning_rate=BIASES_LEARNING_RATE,
        optimizer="muon",
        adam_beta2=0.999,
        adam_weight_decay=0.0,
        max_grad_norm=0.0,
        unlearning_weight=UNLEARNING_WEIGHT,
        preservation_weight=PRESERVATION_WEIGHT,
        localization_weight=LOCALIZATION_WEIGHT,
        kept_negative_share=0.0,  # six of the kept trajectories have the empty prompt
        seed=seed,
        checkpointing_steps=STEPS + 1,  # no checkpoints: training is short
    )


def learning_rate_factor(step: int) -> float:
    """Returns a trapezoidal schedule: a short rise to 1, a plateau, and a linear fall to 0 over the second half."""
    return min(1.0, (step + 1) / 10, 2 * (STEPS - step) / STEPS)
