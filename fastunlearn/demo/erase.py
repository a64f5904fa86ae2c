"""How the demo erases a concept: the trajectories that `prepare` samples, and the options of `prepare` and `train`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from fastunlearn.demo.world import COLOURS, SHAPES, Noun, Nouns, prompt_of
from fastunlearn.training.data.requests import Request
from fastunlearn.training.options import PrepareOptions, TargetGroup, TrainingOptions

SAMPLING_STEPS = 12
LEADING = (0.0, 0.5)  # part of a trajectory towards the concept in which the erased model can still turn away
# Groups of points: with the concept alone in the prompt, with another shape beside it, and without the concept.
ALONE, BESIDE, KEPT = "alone", "beside", "kept"
TRAJECTORIES = {ALONE: 12, BESIDE: 40, KEPT: 24}
LEADING_TRAJECTORIES = 8  # further trajectories in each of ALONE and BESIDE, sampled towards the concept
UNPROMPTED_TRAJECTORIES = 6  # further trajectories in KEPT, with points for the empty prompt
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


def draw_one(shape: str, draw: random.Random) -> Nouns:
    """Draws a colour for one shape."""
    return (Noun(shape, draw.choice(list(COLOURS))),)


def draw_two(first: str, second: str, draw: random.Random) -> Nouns:
    """Draws different colours for two shapes, and their order."""
    nouns = [Noun(shape, colour) for shape, colour in zip((first, second), draw.sample(list(COLOURS), 2), strict=True)]
    draw.shuffle(nouns)
    return tuple(nouns)


def requests(concept: str, draw: random.Random) -> list[Request]:
    """Returns the requests for all trajectories of the teacher cache."""
    targets = [request for group in (ALONE, BESIDE) for request in target_requests(concept, group, draw)]
    return targets + list(kept_requests(concept, draw))


def target_requests(concept: str, group: str, draw: random.Random) -> Iterator[Request]:
    """Yields requests for trajectories whose points have the concept in their prompt, in the group ALONE or BESIDE.

    Some trajectories are sampled towards the concept, others towards a replacement for it, because the erased model
    must turn away both where the frozen model goes and where the erased model itself will go. The replacement is the
    rest of the prompt or, if nothing is left, another shape. The empty prompt cannot replace the concept, because half
    of its videos show it.
    """
    others = [shape for shape in SHAPES if shape != concept]
    for number in range(LEADING_TRAJECTORIES + TRAJECTORIES[group]):
        other = others[number % 2]
        nouns = draw_one(concept, draw) if group == ALONE else draw_two(concept, other, draw)
        rest = tuple(noun for noun in nouns if noun.shape != concept) or draw_one(other, draw)
        if number < LEADING_TRAJECTORIES:
            yield Request(prompt_of(nouns), group, instead=prompt_of(rest), follow="prompt", steps=LEADING)
        else:
            yield Request(prompt_of(nouns), group, instead=prompt_of(rest), follow="instead")


def kept_requests(concept: str, draw: random.Random) -> Iterator[Request]:
    """Yields requests for trajectories towards other shapes, whose points have these or no shapes in their prompt."""
    first, second = (shape for shape in SHAPES if shape != concept)
    for number in range(TRAJECTORIES[KEPT] + UNPROMPTED_TRAJECTORIES):
        nouns = draw_two(first, second, draw) if number % 2 == 0 else draw_one((first, second)[number // 2 % 2], draw)
        prompt = prompt_of(nouns)
        if number < TRAJECTORIES[KEPT]:
            yield Request(prompt, KEPT)
        else:
            yield Request("", KEPT, instead=prompt, follow="instead")


# `prepare` and `train` get the model and the folders as arguments, and do not read the options for them.


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
        mask_layers=(0,),  # attends to a word at its object; later layers also attend around it
        mask_start=0.5,  # objects have their places by then
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
        learning_rate=MATRICES_LEARNING_RATE,
        bias_learning_rate=BIASES_LEARNING_RATE,
        optimizer="muon",
        adam_beta2=0.999,
        adam_weight_decay=0.0,
        max_grad_norm=0.0,
        unlearning_weight=UNLEARNING_WEIGHT,
        preservation_weight=PRESERVATION_WEIGHT,
        localization_weight=LOCALIZATION_WEIGHT,
        seed=seed,
        checkpointing_steps=STEPS + 1,  # no checkpoints: training is short
    )


def learning_rate_factor(step: int) -> float:
    """Returns a trapezoidal schedule: a short rise to 1, a plateau, and a linear fall to 0 over the second half."""
    return min(1.0, (step + 1) / 10, 2 * (STEPS - step) / STEPS)
