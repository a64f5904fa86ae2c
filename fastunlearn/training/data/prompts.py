"""Reads prompt files, and finds the tokens of the concept in a prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastunlearn.files import expand_home, read_file, shown
from fastunlearn.training.data.words import Span, occurrences, other_forms


class PromptLine(NamedTuple):
    """A line of a prompt file: a prompt, and optionally the same prompt with something else in the concept's place."""

    prompt: str
    instead: str | None = None


def read_prompts(path: str | os.PathLike[str]) -> list[PromptLine]:
    """Reads a UTF-8 text file with one prompt per line. Skips blank lines and lines that start with #.

    A line may hold two prompts, separated by a tab: one with the concept, and the one to replace it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no prompts or is not UTF-8 text, or a line has two tabs or the same or nothing on one
            side of a tab.
    """
    file = expand_home(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: expected a text file with one prompt per line, but there is no such file")
    try:
        text = read_file(file).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got bytes that are not ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path}: expected UTF-8 text, got zero bytes; save it as UTF-8")
    return parse_prompts(text.split("\n"), str(path))


def parse_prompts(lines: Sequence[str], where: str) -> list[PromptLine]:
    """The prompts in lines that are as those of a file, which `read_prompts` describes.

    Args:
        lines: the lines.
        where: where they are, for error messages.

    Raises:
        ValueError: there are no prompts, or a line has two tabs or the same or nothing on one side of a tab.
    """
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.lstrip("\ufeff")  # in the middle of a file where files were joined
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) > 2 or not all(fields) or len(set(fields)) < len(fields):
            raise ValueError(f"{where}, line {number}: expected 'prompt' or 'prompt<TAB>instead', got {shown(line)}")
        prompts.append(PromptLine(fields[0], fields[1] if len(fields) == 2 else None))
    if not prompts:
        raise ValueError(f"{where}: expected one prompt per line, got none")
    return prompts


def concept_tokens(
    tokenizer: Any,
    prompt: str,
    concept: str,
    *,
    max_length: int | None = None,
    template: str = "{}",
    crop_start: int = 0,
) -> list[int]:
    """The positions of the concept's tokens among the tokens of a prompt, for every occurrence of the concept.

    Only whole words count, as `occurrences` finds them: "car" is neither in "scar" nor in "cars".

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text that the text encoder gets.
        concept: one or more words.
        max_length: the number of tokens that the encoder keeps after the crop; all of them if None.
        template: a text whose "{}" is replaced by the prompt. The concept is searched for in the prompt only.
        crop_start: the number of tokens that are dropped at the start. Positions are counted after the crop.

    Raises:
        ValueError: the concept is blank, is not in the prompt, or is there only beyond `max_length`. The message shows
            the prompt's tokens.
    """
    offset = template.index("{}")
    spans = [(start + offset, end + offset) for start, end in occurrences(prompt, concept)]
    text = template[:offset] + prompt + template[offset + 2 :]
    encoding = tokenizer(text, add_special_tokens=True, return_offsets_mapping=bool(tokenizer.is_fast))
    ids: list[int] = list(encoding["input_ids"])
    matches: set[int] = set()
    if spans and tokenizer.is_fast:
        matches = set(_tokens_by_offsets(text, encoding["offset_mapping"], spans))
    elif spans:
        matches = set(_tokens_by_prefixes(tokenizer, text, ids, spans))
    kept_ids, padding = ids, 0
    if max_length is not None:
        length = crop_start + max_length
        kept_ids = tokenizer(text, add_special_tokens=True, truncation=True, max_length=length)["input_ids"]
        if tokenizer.padding_side == "left":
            padding = length - len(kept_ids)
    # Truncated text still ends with the tokenizer's end token, which takes the place of a word's token.
    kept = [token for token in sorted(matches) if token < len(kept_ids) and kept_ids[token] == ids[token]]
    positions = [token + padding - crop_start for token in kept if token + padding >= crop_start]
    if not positions:
        tokens = " ".join(map(str, tokenizer.convert_ids_to_tokens(ids[crop_start:])))
        tokens = "the prompt's tokens: " + (tokens if len(tokens) <= 200 else tokens[:200] + "...")
        if matches:
            raise ValueError(
                f"concept: expected {shown(concept)} in the first {max_length} tokens of the prompt {shown(prompt)}, "
                f"got it only in the rest, which is cut off; shorten the prompt; {tokens}"
            )
        forms = other_forms(prompt, concept)
        hint = (
            f", which is there only as {shown(forms[0])}: write {shown(concept)} in the prompt as well" if forms else ""
        )
        raise ValueError(
            f"concept: expected whole words of the prompt {shown(prompt)}, got {shown(concept)}{hint}; {tokens}"
        )
    return positions


def _tokens_by_offsets(text: str, offsets: Sequence[Span], spans: Sequence[Span]) -> Iterator[int]:
    for token, (start, end) in enumerate(offsets):
        for span_start, span_end in spans:
            shared = text[max(start, span_start) : min(end, span_end)]
            if shared.strip():  # a token for the space between two words does not belong to the concept
                yield token


def _tokens_by_prefixes(tokenizer: Any, text: str, ids: list[int], spans: Sequence[Span]) -> Iterator[int]:
    """Finds tokens with a tokenizer that gives no offsets: tokenizes the text up to each span's start, and to its end.

    A text cut between words has the same tokens as the whole text up to the cut, because no token spans two words.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = next((n for n in range(len(ids)) if ids[n : n + len(plain)] == plain), 0)  # after special tokens
    for start, end in spans:
        before = tokenizer(text[:start].rstrip(), add_special_tokens=False)["input_ids"]
        until_end = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        if plain[: len(until_end)] != until_end or until_end[: len(before)] != before:
            raise ValueError(
                f"tokenizer: expected one that gives offsets or whose tokens end with the words, got "
                f"{type(tokenizer).__name__}, which has tokens that span words"
            )
        yield from range(first + len(before), first + len(until_end))
