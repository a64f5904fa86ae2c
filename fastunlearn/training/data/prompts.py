"""Prompts: reading them from a file, and finding the tokens of a concept in one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Scripts that put no spaces between words: kana, Chinese characters, Thai, Lao, Khmer, Burmese.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")


class PromptLine(NamedTuple):
    """A line of a prompt file: the prompt, and the same with something else in the concept's place if it says so."""

    prompt: str
    instead: str | None


def read_prompts(path: str | os.PathLike[str]) -> list[PromptLine]:
    """The prompts of a UTF-8 text file, one a line; blank lines and lines that start with # are skipped.

    A line may hold two, divided by a tab: a prompt with the concept in it, and what it should become without.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no prompt or is not UTF-8, or a line has more than one tab or an empty side of one.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a text file with a prompt a line")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from error
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) > 2 or not all(fields):
            raise ValueError(f"{path}, line {number}: expected 'prompt' or 'prompt<TAB>instead', got {line!r}")
        prompts.append(PromptLine(fields[0], fields[1] if len(fields) == 2 else None))
    if not prompts:
        raise ValueError(f"{path}: expected a prompt a line, found none")
    return prompts


def occurrences(text: str, concept: str) -> list[tuple[int, int]]:
    """Where `concept` stands in `text`, (start, end) each: whole words, in any case, any whitespace between words.

    Raises:
        ValueError: the concept is blank.
    """
    words = concept.split()
    if not words:
        raise ValueError(f"concept: expected one or more words, got {concept!r}")
    # Where a script has no spaces, every place is a word's edge.
    before = "" if _UNSPACED.match(words[0][0]) else r"(?<!\w)"
    after = "" if _UNSPACED.match(words[-1][-1]) else r"(?!\w)"
    pattern = before + r"\s+".join(re.escape(word) for word in words) + after
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


def concept_tokens(
    tokenizer: Any,
    prompt: str,
    concept: str,
    *,
    max_length: int | None = None,
    template: str = "{}",
    crop_start: int = 0,
) -> list[int]:
    """The positions of a concept's tokens among those of a prompt, every occurrence's.

    Whole words in any case: "car" is not in "scar", nor in "cars".

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the text as the text encoder gets it.
        concept: one or more words.
        max_length: how many tokens are used, after the crop; all of them if None.
        template: what the prompt is put into, at "{}". The concept is looked for in the prompt only.
        crop_start: how many tokens are dropped at the start; positions count from there.

    Raises:
        ValueError: the concept is blank, not in the prompt, or only behind `max_length`. The message shows the tokens.
    """
    offset = template.index("{}")
    places = [(start + offset, end + offset) for start, end in occurrences(prompt, concept)]
    text = template[:offset] + prompt + template[offset + 2 :]
    encoding = tokenizer(text, add_special_tokens=True, return_offsets_mapping=bool(tokenizer.is_fast))
    ids: list[int] = list(encoding["input_ids"])
    found: set[int] = set()
    if places and tokenizer.is_fast:
        found = set(_by_offsets(text, encoding["offset_mapping"], places))
    elif places:
        found = set(_by_prefixes(tokenizer, text, ids, places))
    used, padding = ids, 0
    if max_length is not None:
        # A text that is cut still ends as the tokenizer ends texts: there a word's token gives way to the end's.
        length = crop_start + max_length
        used = tokenizer(text, add_special_tokens=True, truncation=True, max_length=length)["input_ids"]
        if tokenizer.padding_side == "left":
            padding = length - len(used)
    positions = [position for position in sorted(found) if position < len(used) and used[position] == ids[position]]
    kept = [position + padding - crop_start for position in positions if position + padding >= crop_start]
    if not kept:
        why = f"is not in the prompt {prompt!r} as a word of its own"
        if found:
            why = f"is cut off: {max_length} tokens are used of the prompt {prompt!r}, and it stands behind them"
        shown = " ".join(map(str, tokenizer.convert_ids_to_tokens(ids[crop_start:])))
        raise ValueError(f"concept: {concept!r} {why}; the prompt's tokens: {shown}")
    return kept


def _by_offsets(text: str, offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> Iterator[int]:
    for position, (start, end) in enumerate(offsets):
        for place_start, place_end in places:
            shared = text[max(start, place_start) : min(end, place_end)]
            if shared.strip():  # a token of nothing but the space between two words is not the concept's
                yield position


def _by_prefixes(tokenizer: Any, text: str, ids: list[int], places: Sequence[tuple[int, int]]) -> Iterator[int]:
    """For tokenizers that know no offsets: the tokens that the text up to the concept's end has more than up to it.

    A text cut at a word's edge has the tokens of the whole text, up to there, because no token spans two words.
    """
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = next((n for n in range(len(ids)) if ids[n : n + len(plain)] == plain), 0)  # tokens put in front
    for start, end in places:
        before = tokenizer(text[:start].rstrip(), add_special_tokens=False)["input_ids"]
        until = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        if plain[: len(until)] != until or until[: len(before)] != before:
            raise ValueError(f"tokenizer: {type(tokenizer).__name__} gives no offsets, and tokens that span words")
        yield from range(special + len(before), special + len(until))
