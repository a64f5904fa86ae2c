"""Encodes prompts with a saved pipeline's text encoders. No other component is loaded, and these are freed again.

The demo's model is loaded whole: it is small.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.devices import round_buffers
from fastunlearn.families import Condition, Family
from fastunlearn.files import shown
from fastunlearn.training.data.prompts import concept_tokens
from fastunlearn.training.data.words import occurrences
from fastunlearn.training.model.demo_model import load_demo_model, warn_of_unknown_words
from fastunlearn.training.model.loading import load_components, pipeline_class, text_length
from fastunlearn.training.model.pipeline_folder import one_line_errors

if TYPE_CHECKING:  # fastunlearn.demo imports fastunlearn.training
    from fastunlearn.demo.model import TextToVideo


class EncodedPrompt(NamedTuple):
    """A prompt in the form that the transformer takes.

    Attributes:
        prompt: the text.
        condition: keyword of the transformer's forward method -> tensor, without a batch dimension.
        token_indices: the positions of the concept's tokens among the text tokens that the transformer attends to;
            empty if the concept is not in the prompt.
    """

    prompt: str
    condition: dict[str, Tensor]
    token_indices: list[int]


def encode_prompts(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    concept: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    must_contain: Collection[str] = (),
    must_not_contain: Collection[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, EncodedPrompt]:
    """Encodes prompts as the pipeline itself does, and finds the concept's tokens in them.

    Warns if a prompt is longer than what the transformer gets of it.

    Args:
        path: as for `load_model`.
        prompts: each distinct prompt is encoded once.
        concept: the words whose tokens to find, as `occurrences` finds them in the prompt as the pipeline cleans it.
            None finds nothing.
        dtype: the dtype of the text encoders and the embeddings.
        device: where to encode; the conditions stay there.
        must_contain: prompts that must contain the concept.
        must_not_contain: prompts that must not contain it.
        trust_remote_code: let the pipeline run code of its own.

    Returns:
        Prompt -> encoded prompt.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: the pipeline's class is not supported, the concept is blank, missing from one of `must_contain` or
            in one of `must_not_contain`, or a prompt is so long that the concept in it is cut off. The message shows
            the prompt's tokens.
        TypeError: `prompts` is a single string.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a sequence of strings, got the string {shown(prompts)}")
    path = os.path.expanduser(path)
    demo = load_demo_model(path)
    encoders = _PipelineText(path, dtype, device, trust_remote_code) if demo is None else _DemoText(demo, dtype, device)
    tokenizer, family, length = encoders.tokenizer, encoders.family, encoders.length
    # All prompts are checked before the encoders are loaded, which takes minutes.
    token_indices = {
        prompt: _token_indices(tokenizer, family, prompt, concept, length, prompt in must_contain) for prompt in prompts
    }
    for prompt in must_not_contain:
        if token_indices.get(prompt):
            raise ValueError(
                f"concept: expected {shown(concept)} in no prompt but the targets, got it in {shown(prompt)}, which "
                f"the pipeline reads as {shown(family.tokenizer_input(prompt).prompt)}"
            )
    _warn_of_long_prompts(tokenizer, family, list(token_indices), length)
    if demo is not None:
        warn_of_unknown_words(demo, list(token_indices))
    with torch.no_grad():
        conditions = encoders.encode(list(token_indices))
    _free_memory()
    return {
        prompt: EncodedPrompt(prompt, {key: value[0] for key, value in condition.items()}, indices)
        for (prompt, indices), condition in zip(token_indices.items(), conditions, strict=True)
    }


class _PipelineText:
    """The tokenizer of a saved pipeline; its text encoders are loaded to encode, and freed again."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool) -> None:
        self._path, self._dtype, self._device, self._trust_remote_code = path, dtype, device, trust_remote_code
        self._cls, self.family = pipeline_class(path, trust_remote_code)
        self.length = text_length(self._cls, self.family, path, trust_remote_code)
        encoders = [name for name in self.family.text_components if name != "tokenizer"]
        self.tokenizer = self._load(*encoders).tokenizer
        with one_line_errors(f"the tokenizer of {shown(path, 300)}"):
            self.tokenizer("")  # fails here if it fails whatever the prompt

    def _load(self, *without: str) -> Any:
        left_out = (*self.family.denoisers, "vae", *without)
        return load_components(self._cls, self._path, self._dtype, left_out, self._trust_remote_code)

    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        pipeline = self._load().to(self._device)
        with one_line_errors(f"a text encoder of {shown(self._path, 300)}"):
            return [self.family.encode(pipeline, prompt, self.length) for prompt in prompts]


class _DemoText:
    """The tokenizer and the text encoder of the demo's model."""

    def __init__(self, model: TextToVideo, dtype: torch.dtype, device: torch.device | str) -> None:
        round_buffers([model], torch.device(device))
        self._model = model.rounded(dtype).to(device)
        self.tokenizer, self.length = model.tokenizer, model.text_length
        self.family = model.without_text_encoder().family

    def encode(self, prompts: Sequence[str]) -> list[Condition]:
        return [{"encoder_hidden_states": self._model.encode([prompt])} for prompt in prompts]


def _token_indices(
    tokenizer: Any, family: Family, prompt: str, concept: str | None, length: int, must_contain: bool
) -> list[int]:
    if concept is None:
        return []
    text = family.tokenizer_input(prompt)
    concept = family.tokenizer_input(concept).prompt  # cleaned as the prompt is
    if not (must_contain or occurrences(text.prompt, concept)):
        return []
    return concept_tokens(
        tokenizer, text.prompt, concept, max_length=length, template=text.template, crop_start=text.crop_start
    )


def _warn_of_long_prompts(tokenizer: Any, family: Family, prompts: Sequence[str], length: int) -> None:
    too_long = []
    for prompt in prompts:
        text = family.tokenizer_input(prompt)
        count = len(tokenizer(text.template.replace("{}", text.prompt, 1))["input_ids"]) - text.crop_start
        if count > length:
            too_long.append((prompt, count))
    if too_long:
        prompt, count = too_long[0]
        further = f", and {len(too_long) - 1} other prompts are too long" if len(too_long) > 1 else ""
        warnings.warn(
            f"prompts: expected at most {length} tokens, which is all that the model reads, got {count} in "
            f"{shown(prompt)}; the rest is cut off{further}",
            stacklevel=3,
        )


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
