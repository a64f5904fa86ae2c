"""Looks for the concept in videos that are sampled with the erasers on. The frozen model is the one that looks.

A text-to-video model is a zero-shot classifier (Diffusion Classifier, Li et al., 2023, arXiv 2303.16203): of two
prompts, a video fits the one with which the model better predicts the noise that was added to the video. Here these are
the target prompt and its baseline, which is the prompt without the concept.

1. The latents x_0 of a video are noised to x_t with the noise eps. v* is the velocity that a perfect model would
   predict there (`VideoModel.velocity_target`).
2. v and v_0 are the frozen model's velocities at x_t with the prompt and with the baseline.
3. ||v* - v_0||^2 - ||v* - v||^2 = (2 c - 1) ||v - v_0||^2 with c = <v* - v_0, v - v_0> / ||v - v_0||^2.

So the prompt explains the video better if c > 1/2: then the concept is *seen*. c is the erasure coefficient of v*, with
both sums over several noise levels. It is called the *likeness* to the concept: about 1 for a video of the prompt, and
0 for a video of the baseline.

Of all that `fastunlearn evaluate` measures, the share of videos in which the concept is seen ranks erasers most like a
classifier of the videos does: `python -m fastunlearn.bench.recipes` measures how much, bench/README.md has the numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.files import shown
from fastunlearn.training.cache.reader import TeacherCache
from fastunlearn.training.data.recipe import KEPT
from fastunlearn.training.data.requests import INSTEAD, NEGATIVE, PROMPT
from fastunlearn.training.evaluation.metrics import Ratio, erasure
from fastunlearn.training.model.erased import without_erasers
from fastunlearn.training.model.sampling import Conditions, denoise, scheduler_for, velocities
from fastunlearn.training.model.video_model import VideoModel
from fastunlearn.training.option_fields import is_scale, is_seed, is_steps
from fastunlearn.training.random_numbers import random_generator

ERASED, FROZEN, BASELINE = "erased", "frozen", "baseline"  # the prompt with erasers, without, and the baseline without
VERSIONS = (ERASED, FROZEN, BASELINE)

NOISE_LEVELS = 8
# The part of the sampling steps that the noise levels are taken from. Near the ends there is nothing to see: in pure
# noise both prompts guess, and in a nearly clean video both see what is there.
LEVELS_FROM = (0.1, 0.8)
ON_POLICY_STEPS = 5

_SEEN = 0.5  # the likeness above which the prompt explains a video better than the baseline


class Video(NamedTuple):
    """A video to sample: its prompts, and the key of its noise."""

    prompt: str
    baseline: str
    key: tuple[object, ...]


class Settings(NamedTuple):
    """How a cache's trajectories were sampled, and its videos are."""

    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float


@dataclass
class Sightings:
    """What was seen in which videos.

    Attributes:
        prompts: the target prompt of each video.
        likeness: for each of VERSIONS, the likeness of each video to the concept.
        on_policy: the erasure coefficient at points of the trajectories that the erased model itself takes.
    """

    prompts: list[str] = field(default_factory=list)
    likeness: dict[str, list[float]] = field(default_factory=lambda: {version: [] for version in VERSIONS})
    on_policy: Ratio = field(default_factory=Ratio)

    def share_seen(self, version: str, prompt: str | None = None) -> float | None:
        """The share of the videos of a version in which the concept is seen; of one prompt, if given. None of none."""
        chosen = [
            likeness > _SEEN
            for likeness, own in zip(self.likeness[version], self.prompts, strict=True)
            if prompt in (None, own)
        ]
        return sum(chosen) / len(chosen) if chosen else None

    @property
    def mean_likeness(self) -> float | None:
        """The mean likeness with erasers, on a scale where 1 is the frozen model's mean and 0 that of the baseline.

        None if there are no videos, or the frozen model's are not more like the concept than those of the baseline.
        """
        if not self.prompts:
            return None
        now, before, baseline = (statistics.fmean(self.likeness[version]) for version in VERSIONS)
        return (now - baseline) / (before - baseline) if before > baseline else None

    def report(self) -> dict[str, Any] | None:
        """The sightings as plain data for JSON; None if there are none."""
        if not self.prompts:
            return None
        return {
            "videos": len(self.prompts),
            "share": self._shares(),
            "mean_likeness": self.mean_likeness,
            "likeness": {version: list(values) for version, values in self.likeness.items()},
            "on_policy_coefficient": self.on_policy.total,
            "by_prompt": [
                {"prompt": prompt, "videos": self.prompts.count(prompt), "share": self._shares(prompt)}
                for prompt in dict.fromkeys(self.prompts)
            ],
        }

    def _shares(self, prompt: str | None = None) -> dict[str, float | None]:
        return {version: self.share_seen(version, prompt) for version in VERSIONS}


@torch.no_grad()
def look(
    model: VideoModel,
    cache: TeacherCache,
    num_videos: int | None = None,
    batch_size: int = 1,
    *,
    advance: Callable[[int], Any] = lambda _: None,
    on_videos: Callable[[str, Sequence[Video], Tensor], Any] = lambda *_: None,
) -> Sightings:
    """Samples videos of the target prompts of a cache, with erasers and without, and looks for the concept in them.

    They are sampled as the cache's trajectories were: the same noise, guidance and number of steps.

    Args:
        model: a model with erasers attached.
        cache: a cache made with the model without erasers.
        num_videos: how many videos; None for one per target trajectory. The trajectories take turns, with new noise.
        batch_size: videos per forward pass.
        advance: called with the number of videos whenever some are done.
        on_videos: called with the version, the videos of a batch, and their latents (B, ...).

    Raises:
        ValueError: the cache does not say how it was sampled, conditions of prompts in a batch differ in shape, or a
            video is not finite.
    """
    settings = _settings(cache)
    videos = _videos(cache, num_videos)
    sightings = Sightings()
    for start in range(0, len(videos), batch_size):
        batch = videos[start : start + batch_size]
        conditions = _conditions(model, cache, batch, settings)
        sightings.prompts += [video.prompt for video in batch]
        for version in VERSIONS:
            x_0 = _sample(model, batch, conditions, cache, settings, version, sightings.on_policy)
            on_videos(version, batch, x_0)
            sightings.likeness[version] += _likeness(model, x_0, batch, conditions, settings.num_inference_steps)
        advance(len(batch))
    return sightings


def _settings(cache: TeacherCache) -> Settings:
    facts = cache.facts
    try:
        is_steps("num_inference_steps", facts.get("num_inference_steps"))
        is_scale("guidance_scale", facts.get("guidance_scale"))
        is_seed("seed", facts.get("seed"))
        if facts.get("negative_prompt") not in cache.prompts:
            raise ValueError(f"negative_prompt: expected one of its prompts, got {shown(facts.get('negative_prompt'))}")
    except ValueError as error:
        raise ValueError(f"{cache.folder}: expected a cache that says how it was sampled, but {error}") from error
    return Settings(facts["negative_prompt"], facts["num_inference_steps"], facts["guidance_scale"])


def _videos(cache: TeacherCache, count: int | None) -> list[Video]:
    """The videos to sample. The first round has the noise of the cache's own trajectories."""
    requests = cache.facts.get("requests")
    if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
        raise ValueError(f"{cache.folder}: expected a list of requests in its facts, got {shown(requests)}")
    targets = []
    for index, request in enumerate(requests):
        if request.get("group") == KEPT:
            continue
        prompt, instead = request.get("prompt"), request.get("instead")
        baseline = cache.facts["negative_prompt"] if instead is None else instead
        for text in (prompt, baseline):
            if text not in cache.prompts:
                raise ValueError(f"{cache.folder}: expected the condition of every prompt, got none of {shown(text)}")
        targets.append((prompt, baseline, index))
    seed = cache.facts["seed"]
    count = len(targets) if count is None else count
    videos = []
    for number in range(count if targets else 0):
        turn, place = divmod(number, len(targets))
        prompt, baseline, index = targets[place]
        key = (seed, "noise", index) if turn == 0 else (seed, "noise", index, turn)
        videos.append(Video(prompt, baseline, key))
    return videos


def _conditions(model: VideoModel, cache: TeacherCache, videos: Sequence[Video], settings: Settings) -> Conditions:
    """The batches of the three conditions, by name."""
    texts = {
        NEGATIVE: [settings.negative_prompt] * len(videos),
        PROMPT: [video.prompt for video in videos],
        INSTEAD: [video.baseline for video in videos],
    }
    points = next(iter(cache.groups.values()))
    numbers = {name: [cache.prompts.index(text) for text in prompts] for name, prompts in texts.items()}
    return {
        name: {keyword: tensor.to(model.device) for keyword, tensor in points.condition(indices).items()}
        for name, indices in numbers.items()
    }


def _sample(
    model: VideoModel,
    videos: Sequence[Video],
    conditions: Conditions,
    cache: TeacherCache,
    settings: Settings,
    version: str,
    on_policy: Ratio,
) -> Tensor:
    """Samples one version of videos: their latents (B, ...) in float32. With the erasers, it adds to `on_policy`."""
    follow = INSTEAD if version == BASELINE else PROMPT
    needed = [follow] if settings.guidance_scale == 1 else [NEGATIVE, follow]
    generators = [random_generator(*video.key) for video in videos]
    noise = torch.stack([torch.randn(cache.facts["latent_shape"], generator=generator) for generator in generators])
    measured = set(_spread(ON_POLICY_STEPS, 0, settings.num_inference_steps)) if version == ERASED else set()
    x_0 = noise
    with nullcontext() if version == ERASED else without_erasers(model):
        for step in denoise(
            model,
            noise,
            {name: conditions[name] for name in needed},
            follow=follow,
            guide_from=NEGATIVE,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            generators=generators,
        ):
            x_0 = step.x_next
            if not x_0.isfinite().all():
                raise ValueError(
                    f"video: expected finite latents, got NaN or infinity at t={step.t:g} for "
                    f"{shown(videos[0].prompt)} ({version}); the model overflows in {model.dtype}, or guidance or the "
                    "erasers are too strong"
                )
            if step.index in measured:
                frozen = _frozen_velocities(model, step.x_t, torch.tensor(step.t, device=model.device), conditions)
                on_policy.add(torch.tensor(step.t), erasure(step.velocities[PROMPT], frozen[INSTEAD], frozen[PROMPT]))
    return x_0.float()


def _likeness(
    model: VideoModel, x_0: Tensor, videos: Sequence[Video], conditions: Conditions, num_inference_steps: int
) -> list[float]:
    """The likeness of each of B videos to the concept; 1/2 where the two prompts make no difference to the model."""
    timesteps = scheduler_for(model, num_inference_steps).timesteps
    start, end = (share * num_inference_steps for share in LEVELS_FROM)
    along, length = torch.zeros(2, len(x_0), dtype=torch.float64)
    for number, level in enumerate(_spread(NOISE_LEVELS, start, end)):
        generators = [random_generator(*video.key, "level", number) for video in videos]
        eps = torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators]).to(x_0)
        t = timesteps[level].expand(len(x_0))
        frozen = _frozen_velocities(model, model.add_noise(x_0, eps, t), timesteps[level], conditions)
        sums = erasure(model.velocity_target(x_0, eps, t), frozen[INSTEAD], frozen[PROMPT])
        along += sums.numerator.cpu()
        length += sums.denominator.cpu()
    return torch.where(length > 0, along / length, _SEEN).tolist()


def _frozen_velocities(model: VideoModel, x_t: Tensor, t: Tensor, conditions: Conditions) -> dict[str, Tensor]:
    """The velocities with the prompt and with the baseline, one after the other: no more memory than sampling takes."""
    with without_erasers(model):
        pair = {name: conditions[name] for name in (PROMPT, INSTEAD)}
        return velocities(model, x_t, t, pair, one_at_a_time=True)


def _spread(count: int, start: float, end: float) -> list[int]:
    """The middles of `count` equal parts of the range from `start` to below `end`, rounded down."""
    return [int(start + (end - start) * (part + 0.5) / count) for part in range(count)]
