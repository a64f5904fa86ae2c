"""How a concept is erased from the demo's model: what `prepare` is asked for, and what `train` is told."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from fastunlearn.demo.world import COLOURS, SHAPES, Noun, prompt_of
from fastunlearn.training.data.requests import Request
from fastunlearn.training.options import PrepareOptions, TargetGroup, TrainingOptions

SAMPLING_STEPS = 12
LEADING = (0.0, 0.5)  # of the steps towards the concept: where the erased model still can turn away
# Groups of points: those that ask for the concept alone, or beside another shape, and those that do not ask for it.
ALONE, BESIDE, KEPT = "alone", "beside", "kept"
TRAJECTORIES = {ALONE: 12, BESIDE: 40, KEPT: 24}
LEADING_TRAJECTORIES = 8  # for either kind of target, besides
UNPROMPTED_TRAJECTORIES = 6  # to be kept, besides
TRAJECTORIES_AT_A_TIME = 24

RANK = 64
STEPS = 240
POINTS_A_STEP = 12  # to turn away at, and as many to keep
MATRICES_LEARNING_RATE = 3e-2  # with Muon: half the steps that AdamW needs to the same loss
BIASES_LEARNING_RATE = 1e-2
UNLEARNING_WEIGHT, PRESERVATION_WEIGHT, LOCALIZATION_WEIGHT = 1.0, 1.0, 0.004
# How far beyond what stands for the concept the target lies. Beside another shape not at all: that way leads away from
# the other shape too.
TARGETS = (
    TargetGroup(ALONE, guidance_scale=1.0, share=1.0),
    TargetGroup(BESIDE, guidance_scale=0.0, share=3.0),
)


def one(shape: str, draw: random.Random) -> tuple[Noun, ...]:
    """One shape in any colour, to be asked for."""
    return (Noun(shape, draw.choice(list(COLOURS))),)


def two(first: str, second: str, draw: random.Random) -> tuple[Noun, ...]:
    """Two shapes, in different colours and either order."""
    nouns = [Noun(shape, colour) for shape, colour in zip((first, second), draw.sample(list(COLOURS), 2), strict=True)]
    draw.shuffle(nouns)
    return tuple(nouns)


def requests(concept: str, draw: random.Random) -> list[Request]:
    """All trajectories of the teacher cache."""
    targets = [request for group in (ALONE, BESIDE) for request in target_requests(concept, group, draw)]
    return targets + list(kept_requests(concept, draw))


def target_requests(concept: str, group: str, draw: random.Random) -> Iterator[Request]:
    """Trajectories with points at which the concept is asked for, alone or beside another shape.

    They lead to the concept, or to what stands for it: the erased model must turn away both where the frozen model
    would go and where it itself will go. What stands for the concept is the rest of the prompt. Where nothing is left
    it is any other shape: half of all videos show the concept, so that the empty prompt would bring it back.
    """
    others = [shape for shape in SHAPES if shape != concept]
    for number in range(LEADING_TRAJECTORIES + TRAJECTORIES[group]):
        other = others[number % 2]
        nouns = one(concept, draw) if group == ALONE else two(concept, other, draw)
        rest = tuple(noun for noun in nouns if noun.shape != concept) or one(other, draw)
        if number < LEADING_TRAJECTORIES:
            yield Request(prompt_of(nouns), group, instead=prompt_of(rest), follow="prompt", steps=LEADING)
        else:
            yield Request(prompt_of(nouns), group, instead=prompt_of(rest), follow="instead")


def kept_requests(concept: str, draw: random.Random) -> Iterator[Request]:
    """Trajectories to other shapes, with points at which these are asked for, or nothing in particular."""
    first, second = (shape for shape in SHAPES if shape != concept)
    for number in range(TRAJECTORIES[KEPT] + UNPROMPTED_TRAJECTORIES):
        nouns = two(first, second, draw) if number % 2 == 0 else one((first, second)[number // 2 % 2], draw)
        prompt = prompt_of(nouns)
        if number < TRAJECTORIES[KEPT]:
            yield Request(prompt, KEPT)
        else:
            yield Request("", KEPT, instead=prompt, follow="instead")


# `prepare` and `train` get the model and their folders as arguments: the options' own are not read.


def prepare_options(concept: str, seed: int) -> PrepareOptions:
    """For `prepare`, and for all other sampling and masks of the demo."""
    return PrepareOptions(
        pretrained_model_name_or_path="",
        output_dir=Path(),
        concept=concept,
        timesteps_per_trajectory=SAMPLING_STEPS,
        num_inference_steps=SAMPLING_STEPS,
        batch_size=TRAJECTORIES_AT_A_TIME,
        mask_threshold=0.45,
        mask_layers=(0,),  # attends to a word where its object is; the later ones also around it
        mask_start=0.5,  # the objects have found their places
        seed=seed,
    )


def training_options(seed: int) -> TrainingOptions:
    """For `train`, which gets TARGETS and `learning_rate_factor` besides."""
    return TrainingOptions(
        pretrained_model_name_or_path="",
        cache_dir=Path(),
        output_dir=Path(),
        rank=RANK,
        max_train_steps=STEPS,
        train_batch_size=POINTS_A_STEP,
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
        checkpointing_steps=STEPS + 1,  # it is over before one would be of use
    )


def learning_rate_factor(step: int) -> float:
    """Trapezoid: a short rise to 1, a plateau, a straight fall to zero over the second half."""
    return min(1.0, (step + 1) / 10, 2 * (STEPS - step) / STEPS)
