"""What `prepare` is asked for: one request per trajectory, from prompt files or from the user's own videos."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastunlearn.files import expand_home
from fastunlearn.training.data.prompts import PromptLine, occurrences, read_prompts
from fastunlearn.training.options import PrepareOptions

NEGATIVE, PROMPT, INSTEAD = "negative", "prompt", "instead"  # the names of a trajectory's conditions
_VIDEOS, _LATENTS = (".mp4", ".gif"), ".safetensors"  # the suffixes of a request's source


@dataclass(frozen=True)
class Request:
    """Asks for points of one trajectory.

    Attributes:
        prompt: the prompt that `v_cond` is computed with.
        group: the group of the points in the cache.
        instead: the prompt that `v_uncond` is computed with; the negative prompt if None.
        follow: which of these two prompts sampling follows; guidance always leads away from the negative prompt.
        steps: the part of the sampling steps, from 0 to 1, that points are taken from.
        source: a file with a video or its latents. Points are then taken from the noised video, without sampling, and
            `follow` is ignored.
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
            raise ValueError(f"steps: expected a start below an end, both from 0 to 1; got {self.steps!r}")

    @property
    def baseline(self) -> str:
        """The name of the condition that `v_uncond` is computed with."""
        return NEGATIVE if self.instead is None else INSTEAD

    @property
    def needs_vae(self) -> bool:
        """Whether the source is a video, which has to be encoded."""
        return self.source is not None and not holds_latents(self.source)


def holds_latents(source: Path) -> bool:
    """Whether a request's source holds latents instead of a video."""
    return source.suffix.lower() == _LATENTS


def read_requests(options: PrepareOptions) -> list[Request]:
    """The requests that the options describe: one per video in `data`, or `num_trajectories` per prompt file.

    The prompts of a file take turns.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no file is given, one is not in the expected format, or the concept is missing from a prompt that
            needs it or is in one that must not have it.
    """
    if options.data is not None:
        if options.target_prompts is not None or options.kept_prompts is not None:
            raise ValueError(
                "data: expected no target_prompts or kept_prompts together with it, because each video has its own "
                "prompt; got both"
            )
        return read_video_requests(options.data, options.concept)
    requests: list[Request] = []
    for group, path in (("target", options.target_prompts), ("kept", options.kept_prompts)):
        if path is None:
            continue
        lines = read_prompts(path)
        if len(lines) > options.num_trajectories:
            warnings.warn(
                f"{path}: only {options.num_trajectories} of {len(lines)} prompts are used; raise num_trajectories to "
                "use them all",
                stacklevel=2,
            )
        for index in range(options.num_trajectories):
            line = lines[index % len(lines)]
            _check_concept_absent(options.concept, group, path, line)
            requests.append(Request(line.prompt, group, line.instead))
    if not requests:
        raise ValueError(
            "target_prompts: expected a file of prompts here or as kept_prompts, or a folder of videos as data; got "
            "none of them"
        )
    return requests


def _check_concept_absent(concept: str, group: str, path: Path, line: PromptLine) -> None:
    """Checks the prompts that must not contain the concept.

    That target prompts contain it is checked when they are tokenized, where the error can show the tokens.
    """
    for text in (line.prompt if group == "kept" else "", line.instead or ""):
        if occurrences(text, concept):
            raise ValueError(f"{path}: expected a prompt without {concept!r}, got {text!r}")


def read_video_requests(folder: str | os.PathLike[str], concept: str) -> list[Request]:
    """One request per video in a folder: of group "target" if its prompt contains the concept, else of "kept".

    A video is `NAME.mp4`, `NAME.gif`, or its latents in `NAME.safetensors`. Its prompt is in `NAME.txt`, optionally
    followed by a tab and a prompt without the concept.

    Raises:
        FileNotFoundError: the folder or a video's prompt does not exist.
        ValueError: there are no videos, or a text file has more than one prompt or the concept after the tab.
    """
    folder = expand_home(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of videos, got {str(folder)!r}")
    sources = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*_VIDEOS, _LATENTS))
    if not sources:
        raise ValueError(f"data: expected {', '.join(_VIDEOS)} or {_LATENTS} files in {str(folder)!r}, got none")
    requests = []
    for source in sources:
        prompt_file = source.with_suffix(".txt")
        lines = read_prompts(prompt_file)
        if len(lines) != 1:
            raise ValueError(f"{prompt_file}: expected one prompt, got {len(lines)}")
        prompt, instead = lines[0]
        if instead is not None and occurrences(instead, concept):
            raise ValueError(f"{prompt_file}: expected a prompt without {concept!r} after the tab, got {instead!r}")
        group = "target" if occurrences(prompt, concept) else "kept"
        requests.append(Request(prompt, group, instead, source=source))
    return requests


def distinct_prompts(requests: Sequence[Request], negative_prompt: str) -> list[str]:
    """Every prompt whose condition the trajectories need, each once. The negative prompt comes last if it is new."""
    wanted = [prompt for request in requests for prompt in (request.prompt, request.instead) if prompt is not None]
    return list(dict.fromkeys([*wanted, negative_prompt]))
