"""What `prepare` is asked for: a request per trajectory, from prompt files or from the user's own videos."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastunlearn.training.data.prompts import PromptLine, occurrences, read_prompts
from fastunlearn.training.data.user_videos import LATENTS, VIDEOS
from fastunlearn.training.options import PrepareOptions

NEGATIVE, PROMPT, INSTEAD = "negative", "prompt", "instead"  # names of the conditions of a trajectory


@dataclass(frozen=True)
class Request:
    """A trajectory to take points from.

    Attributes:
        prompt: what `v_cond` is the velocity at.
        group: of its points in the cache.
        instead: the prompt that `v_uncond` is the velocity at; the negative prompt if None.
        follow: which of the two sampling is led to, from the negative prompt.
        steps: the part of the steps, from 0 to 1, that points are taken from.
        source: a video, or latents, to take the points from instead of sampling. Then `follow` is not read.
    """

    prompt: str
    group: str = "target"
    instead: str | None = None
    follow: Literal["prompt", "instead"] = "prompt"
    steps: tuple[float, float] = (0, 1)
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.follow not in (PROMPT, INSTEAD):
            raise ValueError(f"follow: expected 'prompt' or 'instead', got {self.follow!r}")
        if self.follow == INSTEAD and self.instead is None:
            raise ValueError(f"instead: expected a prompt, because follow is 'instead'; got None for {self.prompt!r}")
        start, end = self.steps
        if not 0 <= start < end <= 1:
            raise ValueError(f"steps: expected a part from 0 to 1, got {self.steps!r}")

    @property
    def without(self) -> str:
        """The name of the condition of `v_uncond`."""
        return NEGATIVE if self.instead is None else INSTEAD


def requests_of(options: PrepareOptions) -> list[Request]:
    """The trajectories that options ask for.

    `num_trajectories` for each file of prompts, which take turns; or one for each video of `data`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as it should be, there is none, or the concept is missing where it belongs or stands
            where it does not.
    """
    if options.data is not None:
        if options.target_prompts is not None or options.kept_prompts is not None:
            raise ValueError("data: expected no target_prompts and kept_prompts beside it: its videos have their own")
        return read_data(options.data, options.concept)
    requests: list[Request] = []
    for group, path in (("target", options.target_prompts), ("kept", options.kept_prompts)):
        if path is None:
            continue
        lines = read_prompts(path)
        if len(lines) > options.num_trajectories:
            warnings.warn(
                f"{path}: {options.num_trajectories} of {len(lines)} prompts are used; raise num_trajectories",
                stacklevel=2,
            )
        for number in range(options.num_trajectories):
            line = lines[number % len(lines)]
            _check_concept(options.concept, group, path, line)
            requests.append(Request(line.prompt, group, line.instead))
    if not requests:
        raise ValueError("target_prompts: expected a file of prompts here or as kept_prompts, or videos as data")
    return requests


def _check_concept(concept: str, group: str, path: Path, line: PromptLine) -> None:
    """Of target prompts the tokenizer tells better what is wrong."""
    for text in (line.prompt if group == "kept" else "", line.instead or ""):
        if occurrences(text, concept):
            raise ValueError(f"{path}: expected a prompt without {concept!r}, got {text!r}")


def read_data(folder: str | os.PathLike[str], concept: str) -> list[Request]:
    """A request for each video in a folder: of group "target" where its prompt has the concept, else of "kept".

    Beside `NAME.mp4` or `NAME.gif`, or the latents `NAME.safetensors`, stands the prompt in `NAME.txt`. After a tab
    there may be another, without the concept.

    Raises:
        FileNotFoundError: there is no such folder, or no prompt beside a video.
        ValueError: there are no videos, or a text file holds more than one line, or the concept after its tab.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of videos, got {str(folder)!r}")
    sources = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*VIDEOS, LATENTS))
    if not sources:
        raise ValueError(f"data: expected {', '.join(VIDEOS)} or {LATENTS} files in {folder}, found none")
    requests = []
    for source in sources:
        lines = read_prompts(source.with_suffix(".txt"))
        if len(lines) != 1:
            raise ValueError(f"{source.with_suffix('.txt')}: expected one prompt, found {len(lines)}")
        prompt, instead = lines[0]
        if instead is not None and occurrences(instead, concept):
            raise ValueError(
                f"{source.with_suffix('.txt')}: expected a prompt without {concept!r} after the tab, got {instead!r}"
            )
        group = "target" if occurrences(prompt, concept) else "kept"
        requests.append(Request(prompt, group, instead, source=source))
    return requests


def prompts_of(requests: Sequence[Request], negative_prompt: str) -> list[str]:
    """Every prompt that trajectories need the condition of, once."""
    wanted = [prompt for request in requests for prompt in (request.prompt, request.instead) if prompt is not None]
    return list(dict.fromkeys([*wanted, negative_prompt]))
