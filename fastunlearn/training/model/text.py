"""Encodes prompts with a saved pipeline's text encoders. No other component is loaded, and these are freed again."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.families import Family
from fastunlearn.files import shown
from fastunlearn.training.data.prompts import concept_tokens
from fastunlearn.training.data.words import occurrences
from fastunlearn.training.model.loading import load_components, pipeline_class, text_length
from fastunlearn.training.model.pipeline_folder import one_line_errors


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
        path: a folder that `save_pretrained` wrote, or a Hub id.
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
    cls, family = pipeline_class(path, trust_remote_code)
    length = text_length(cls, family, path, trust_remote_code)
    # All prompts are checked before the encoders are loaded, which takes minutes.
    encoders = [name for name in family.text_components if name != "tokenizer"]
    tokenizer = load_components(cls, path, dtype, (*family.denoisers, "vae", *encoders), trust_remote_code).tokenizer
    with one_line_errors(f"the tokenizer of {shown(path, 300)}"):
        tokenizer("")  # fails here if it fails whatever the prompt
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
    pipeline = load_components(cls, path, dtype, (*family.denoisers, "vae"), trust_remote_code).to(device)
    encoded = {}
    with torch.no_grad(), one_line_errors(f"a text encoder of {shown(path, 300)}"):
        for prompt, indices in token_indices.items():
            condition = {key: value[0] for key, value in family.encode(pipeline, prompt, length).items()}
            encoded[prompt] = EncodedPrompt(prompt, condition, indices)
    del pipeline
    _free_memory()
    return encoded


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
