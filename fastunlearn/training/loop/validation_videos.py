"""Videos of some prompts while training goes on: `validation/step-00100.png`, the frozen model's above the erased."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastunlearn.families import Condition
from fastunlearn.files import subfolder
from fastunlearn.training.data.comparison import write_strip
from fastunlearn.training.model.erased import without_erasers
from fastunlearn.training.model.sampling import video
from fastunlearn.training.model.video_model import VideoModel, VideoSize
from fastunlearn.training.options import TrainingOptions

FOLDER = "validation"


def refuse_sharded_model(is_sharded: bool) -> None:
    """Raises ValueError if a model is sharded over processes: then all of them would have to sample together."""
    if is_sharded:
        raise ValueError(
            "validation_prompt: expected none with a model that is sharded over processes, got some; leave them out, "
            "and use fastunlearn sample afterwards"
        )


class ValidationVideos:
    """Samples videos from the same noise every time, at the size and the guidance of the cache.

    Args:
        model: the model that is trained, with its VAE.
        conditions: the condition of every prompt, and of the cache's negative prompt.
        facts: the cache's facts.
        options: the options of training.
        output_dir: the folder of the run.

    Raises:
        ValueError: a condition is missing.
    """

    def __init__(
        self,
        model: VideoModel,
        conditions: Mapping[str, Condition],
        facts: Mapping[str, Any],
        options: TrainingOptions,
        output_dir: Path,
    ) -> None:
        prompts, negative = options.validation_prompt, facts["negative_prompt"]
        missing = [prompt for prompt in (*prompts, negative) if prompt not in conditions]
        if missing:
            raise ValueError(f"validation_conditions: expected one for every prompt, got none for {missing[0]!r}")
        self._model, self._options = model, options
        self._conditions = {
            prompt: {"prompt": conditions[prompt], "negative": conditions[negative]} for prompt in prompts
        }
        self._size = VideoSize(*(facts[name] for name in VideoSize._fields))
        self._guidance_scale = facts["guidance_scale"]
        self._folder = subfolder(output_dir, FOLDER)
        self._frozen: dict[str, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether `step` has a checkpoint. The last one is never due: its erasers have to be written first."""
        return step < self._options.max_train_steps and step % self._options.checkpointing_steps == 0

    @torch.no_grad()
    def write(self, step: int) -> None:
        """Samples every prompt with the erasers as they are after `step` steps, and writes a picture of the videos."""
        rows, labels, captions = [], [], []
        for prompt in self._conditions:
            if prompt not in self._frozen:
                with without_erasers(self._model):
                    self._frozen[prompt] = self._video(prompt)
            rows += [self._frozen[prompt], self._video(prompt)]
            labels += ["before", f"step {step}"]
            captions += [prompt, ""]
        write_strip(self._folder / f"step-{step:05d}.png", rows, labels, captions=captions)

    def _video(self, prompt: str) -> Tensor:
        return video(
            self._model,
            self._conditions[prompt],
            self._size,
            seed=0,
            num_inference_steps=self._options.validation_inference_steps,
            guidance_scale=self._guidance_scale,
        )
