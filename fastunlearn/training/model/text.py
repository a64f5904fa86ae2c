"""Prompts as a saved pipeline's text encoders see them. Only tokenizers and encoders are loaded, and freed again."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastunlearn.families.base import TokenizerInput
from fastunlearn.training.data.prompts import concept_tokens, occurrences
from fastunlearn.training.model.loading import load_components, pipeline_class

Condition = dict[str, Tensor]


class EncodedPrompt(NamedTuple):
    """A prompt as the transformer takes it.

    Attributes:
        prompt: the text.
        condition: tensors by the keyword of the transformer's forward method, without a batch dimension.
        token_indices: the positions of the concept's tokens among the text tokens that the transformer attends to;
            empty where the concept is not in the prompt.
    """

    prompt: str
    condition: Condition
    token_indices: list[int]


def encode_prompts(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    concept: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    must_contain: Collection[str] = (),
) -> dict[str, EncodedPrompt]:
    """Encodes prompts by the pipeline's own `encode_prompt`: the tensors are those that the pipeline would use.

    Args:
        path: a folder that `save_pretrained` made, or a Hub id.
        prompts: each distinct one is encoded once.
        concept: whose tokens to look for, whole words in any case; None for no search.
        dtype: of the text encoders and the embeddings.
        device: where to encode, and where the conditions stay.
        must_contain: prompts that make no sense without the concept.

    Returns:
        The encoded prompts by their text.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: its class is not supported, the concept is blank or not in one of `must_contain`, or a prompt is so
            long that the concept in it is cut off; the message shows the prompt's tokens.
        TypeError: `prompts` is a single string.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts: expected a sequence of strings, got the string {prompts!r}")
    cls, family = pipeline_class(path)
    pipeline = load_components(cls, path, dtype, without=(*family.denoisers, "vae")).to(device)
    length = family.text_length(cls, path)
    # Every mistake in the prompts is found before the first is encoded.
    indices = {
        prompt: _token_indices(
            pipeline.tokenizer, family.tokenizer_input(prompt), concept, length, prompt in must_contain
        )
        for prompt in prompts
    }
    encoded = {}
    with torch.no_grad():
        for prompt, positions in indices.items():
            condition = {key: value[0] for key, value in family.encode(pipeline, prompt, length).items()}
            encoded[prompt] = EncodedPrompt(prompt, condition, positions)
    del pipeline
    _free_memory()
    return encoded


def _token_indices(
    tokenizer: Any, text: TokenizerInput, concept: str | None, length: int, must_contain: bool
) -> list[int]:
    if concept is None or not (must_contain or occurrences(text.prompt, concept)):
        return []
    return concept_tokens(
        tokenizer, text.prompt, concept, max_length=length, template=text.template, crop_start=text.crop_start
    )


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
