"""The videos that the demo judges: from the same prompts and noise, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastunlearn.demo import prompts
from fastunlearn.demo.judge import Judge
from fastunlearn.demo.model import TOKEN_GRID, WEIGHTS, load
from fastunlearn.demo.world import FRAMES, HEIGHT, WIDTH, Nouns, prompt_of
from fastunlearn.devices import round_buffers
from fastunlearn.files import shown
from fastunlearn.training.cache.concept_masks import ConceptMasks
from fastunlearn.training.data.requests import NEGATIVE, PROMPT
from fastunlearn.training.model.sampling import denoise, stack_conditions
from fastunlearn.training.model.text import EncodedPrompt
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.random_numbers import random_generator


@dataclass(frozen=True)
class Generated:
    """Videos (B, F, 3, H, W), and the concept's masks (B, F, h, w), or None."""

    videos: Tensor
    masks: Tensor | None


def generate(
    model: VideoModel,
    prompts: Sequence[EncodedPrompt],
    negative: EncodedPrompt,
    noise: Tensor,
    options: PrepareOptions,
    *,
    with_masks: bool = True,
    on_step: Callable[[], object] | None = None,
) -> Generated:
    """Generates one video per prompt, in the way that `prepare` samples trajectories.

    It computes masks if any prompt contains the concept, unless `with_masks` is False. `on_step` is called after every
    sampling step.
    """
    concept_masks = None
    if with_masks and any(prompt.token_indices for prompt in prompts):
        concept_masks = ConceptMasks(PROMPT, [prompt.token_indices for prompt in prompts], options.mask_layers)
    first_recorded = options.mask_start * options.num_inference_steps
    videos = noise
    for step in denoise(
        model,
        noise,
        {
            NEGATIVE: stack_conditions([negative.condition] * len(prompts), model.device),
            PROMPT: stack_conditions([prompt.condition for prompt in prompts], model.device),
        },
        follow=PROMPT,
        guide_from=NEGATIVE,
        guidance_scale=model.defaults.guidance(options.guidance_scale),
        num_inference_steps=options.num_inference_steps,
        watch=lambda index: concept_masks.watch if concept_masks and index >= first_recorded else None,
    ):
        videos = step.x_next
        if on_step is not None:
            on_step()
    masks = concept_masks.masks(options.mask_threshold, TOKEN_GRID) if concept_masks else None
    return Generated(videos.movedim(model.family.channel_dim, 2), masks)


@dataclass(frozen=True)
class Studio:
    """What the videos are generated from, and who judges them.

    Attributes:
        model: the little model.
        judge: the judge.
        judge_accuracy: the share of rendered videos in which the judge is right.
        prompts: the prompts; those with the concept come first.
        with_concept: how many have it.
        encoded: the encoded prompts.
        negative: the empty prompt, encoded.
        noise: (B, F, 3, H, W), the initial noise of each video.
    """

    model: VideoModel
    judge: Judge
    judge_accuracy: float
    prompts: list[Nouns]
    with_concept: int
    encoded: list[EncodedPrompt]
    negative: EncodedPrompt
    noise: Tensor

    def generate(self, options: PrepareOptions, description: str, *, with_masks: bool) -> Generated:
        """Generates a video per prompt. Masks are of those with the concept."""
        parts = []
        with tqdm(total=2 * options.num_inference_steps, desc=description, unit="step") as bar:
            for rows in (slice(self.with_concept), slice(self.with_concept, None)):
                parts.append(
                    generate(
                        self.model,
                        self.encoded[rows],
                        self.negative,
                        self.noise[rows],
                        options,
                        with_masks=with_masks,
                        on_step=bar.update,
                    )
                )
        return Generated(torch.cat([part.videos for part in parts]), parts[0].masks)


def open_studio(concept: str, seed: int, device: torch.device, weights: Path = WEIGHTS) -> Studio:
    """Loads a model and its judge, and draws noise for the prompts that are judged for `concept`.

    Raises:
        ValueError: the record of training does not say how often the judge is right.
        Others: what `load` raises.
    """
    text_to_video, judge, training_record = load(weights)
    accuracy = training_record.get("judge_accuracy")
    if not isinstance(accuracy, float):
        raise ValueError(f"{weights}: expected judge_accuracy in the record of training, got {shown(accuracy)}")
    round_buffers([text_to_video], device)
    model = text_to_video.to(device).without_text_encoder()
    asked = prompts.judged(concept)
    encoded = text_to_video.encode_prompts(["", *map(prompt_of, asked)], concept)
    shape = model.latent_shape(HEIGHT, WIDTH, FRAMES)
    return Studio(
        model=model,
        judge=judge.to(device),
        judge_accuracy=accuracy,
        prompts=asked,
        with_concept=sum(concept in prompts.kinds_in(nouns) for nouns in asked),
        encoded=[encoded[prompt_of(nouns)] for nouns in asked],
        negative=encoded[""],
        noise=torch.randn(len(asked), *shape, generator=random_generator(seed, "judged videos")),
    )
