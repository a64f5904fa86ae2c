"""What `prepare` is asked for: one request per trajectory, from prompt files or from the user's own videos."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from fastunlearn.files import expand_home, shown
from fastunlearn.training.data.prompts import PromptLine, read_prompts
from fastunlearn.training.data.recipe import KEPT, Targets, read_recipe
from fastunlearn.training.data.words import occurrences, other_forms, replace_concept, similar_words
from fastunlearn.training.options import PrepareOptions

# The names of a trajectory's conditions.
NEGATIVE: Final = "negative"
PROMPT: Final = "prompt"
INSTEAD: Final = "instead"
_VIDEOS = (".mp4", ".gif", ".mov", ".webm", ".mkv", ".avi", ".m4v")  # the suffixes of a request's source
_LATENTS = ".safetensors"


@dataclass(frozen=True)
class Request:
    """Asks for points of one trajectory.

    Attributes:
        prompt: the prompt that `v_cond` is computed with.
        group: the group of the points in the cache.
        instead: the prompt that `v_uncond` is computed with; the negative prompt if None.
        follow: which of these two prompts sampling follows: "prompt", or the other by the name "instead", or "negative"
            if `instead` is None. Guidance always leads away from the negative prompt.
        steps: the part of the sampling steps, from 0 to 1, that points are taken from.
        source: a file with a video or its latents. Points are then taken from the noised video, without sampling, and
            `follow` is ignored.
    """

    prompt: str
    group: str = "target"
    instead: str | None = None
    follow: Literal["prompt", "instead", "negative"] = "prompt"
    steps: tuple[float, float] = (0, 1)
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.follow not in (PROMPT, INSTEAD, NEGATIVE):
            raise ValueError(f"follow: expected 'prompt', 'instead' or 'negative', got {shown(self.follow)}")
        if self.follow == INSTEAD and self.instead is None:
            raise ValueError(
                f"instead: expected a prompt, because follow is 'instead'; got None for {shown(self.prompt)}"
            )
        if self.follow == NEGATIVE and self.instead is not None:
            raise ValueError(
                f"instead: expected None, because follow is 'negative'; got {shown(self.instead)} for "
                f"{shown(self.prompt)}"
            )
        start, end = self.steps
        if not 0 <= start < end <= 1:
            raise ValueError(f"steps: expected a start below an end, both from 0 to 1; got {shown(self.steps)}")

    @property
    def baseline(self) -> Literal["negative", "instead"]:
        """The name of the condition that `v_uncond` is computed with."""
        return NEGATIVE if self.instead is None else INSTEAD

    @property
    def needs_vae(self) -> bool:
        """Whether the source is a video, which has to be encoded."""
        return self.source is not None and not holds_latents(self.source)

    @property
    def needs_ffmpeg(self) -> bool:
        """Whether the source is a video that only ffmpeg reads."""
        return self.source is not None and self.needs_vae and self.source.suffix.lower() != ".gif"


def holds_latents(source: Path) -> bool:
    """Whether a request's source holds latents instead of a video."""
    return source.suffix.lower() == _LATENTS


def read_requests(options: PrepareOptions) -> list[Request]:
    """The requests that the options describe: one per video in `data`, or `num_trajectories` per group of prompts.

    The groups are the target prompts, or those of the recipe, and the kept prompts. The prompts of a group take turns.
    Warns of what is allowed but may be a mistake: no kept prompts, which training needs, repeated prompts, and words
    that resemble the concept where it must not be.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no file is given, one is not in the expected format, there is no target prompt, or the concept, or
            another form of it such as its plural, is in a prompt that must not have it, or is the only one in a prompt
            that needs the concept.
    """
    _refuse_concept(options.concept, options.negative_prompt, "negative_prompt")
    _refuse_concept(options.concept, options.replacement, "replacement")
    groups_of_recipe = () if options.recipe is None else read_recipe(options.recipe).targets
    if options.data is None:
        requests = _read_prompt_requests(options, groups_of_recipe)
    elif groups_of_recipe:
        raise ValueError(
            f"data: expected no videos beside the [[targets]] of {options.recipe}, because each video has its own "
            f"prompt; got {str(options.data)!r}"
        )
    elif options.target_prompts is not None or options.kept_prompts is not None:
        raise ValueError(
            "data: expected no target_prompts or kept_prompts together with it, because each video has its own "
            "prompt; got both"
        )
    else:
        requests = [_with_baseline(request, options) for request in read_video_requests(options.data, options.concept)]
    groups = {request.group for request in requests}
    if not groups - {KEPT}:
        where = "target_prompts" if options.data is None else "data"
        raise ValueError(
            f"{where}: expected at least one prompt with {shown(options.concept)}, which training needs, got none"
        )
    if KEPT not in groups:
        where = "kept_prompts" if options.data is None else "data"
        warnings.warn(
            f"{where}: got no prompt without {shown(options.concept)}; train cannot use this cache unless "
            "--preservation-weight is 0",
            stacklevel=2,
        )
    return requests


def _read_prompt_requests(options: PrepareOptions, targets: Sequence[Targets]) -> list[Request]:
    if targets and options.target_prompts is not None:
        raise ValueError(
            f"target_prompts: expected none beside the [[targets]] of {options.recipe}, got "
            f"{str(options.target_prompts)!r}"
        )
    if not targets and options.target_prompts is None and options.kept_prompts is None:
        raise ValueError(
            "target_prompts: expected a file of prompts here or as kept_prompts, or a folder of videos as data; got "
            "none of them"
        )
    requests: list[Request] = []
    if options.target_prompts is not None:
        lines = read_prompts(options.target_prompts)
        _check_lines(options, "target", str(options.target_prompts), lines)
        requests += target_requests(lines, options)
    for targets_of_recipe in targets:
        assert options.recipe is not None
        lines, own_options = targets_of_recipe.lines(options.recipe), targets_of_recipe.options(options)
        table = f"{options.recipe}: [[targets]] {targets_of_recipe.name}"
        _refuse_concept(options.concept, own_options.replacement, f"{table} replacement")
        where = str(targets_of_recipe.target_prompts or table)
        _check_lines(own_options, targets_of_recipe.name, where, lines)
        start, end = targets_of_recipe.steps
        requests += target_requests(lines, own_options, group=targets_of_recipe.name, steps=(start, end))
    if options.kept_prompts is not None:
        lines = read_prompts(options.kept_prompts)
        _check_lines(options, KEPT, str(options.kept_prompts), lines)
        chosen = [lines[index % len(lines)] for index in range(options.num_trajectories)]
        requests += [Request(line.prompt, KEPT, line.instead) for line in chosen]
    return requests


def target_requests(
    lines: Sequence[PromptLine],
    options: PrepareOptions,
    *,
    group: str = "target",
    steps: tuple[float, float] = (0, 1),
) -> list[Request]:
    """Requests for trajectories of target prompts, which take turns.

    Of each prompt's trajectories, and of each round of the prompts, the share `follow_replacement` follows the
    replacement, evenly spread.

    Args:
        lines: the prompts, each with the one that replaces it or None for the one that the options describe.
        options: `concept`, `replacement`, `baseline`, `follow_replacement` and `num_trajectories` are used.
        group: the group of the points in the cache.
        steps: the part of the sampling steps that points are taken from.
    """
    requests = []
    for index in range(options.num_trajectories):
        turn, number = divmod(index, len(lines))
        line, position, share = lines[number], turn + number, options.follow_replacement
        request = _with_baseline(Request(line.prompt, group, line.instead, steps=steps), options)
        has_replacement = request.instead is not None or options.baseline == "replacement"
        if has_replacement and int((position + 1) * share) > int(position * share):
            request = replace(request, follow=request.baseline)
        requests.append(request)
    return requests


def _with_baseline(request: Request, options: PrepareOptions) -> Request:
    """A request for a target prompt with its replacement, unless it has one or is not to have any."""
    if request.group == KEPT or request.instead is not None or options.baseline == NEGATIVE:
        return request
    replacement = replace_concept(request.prompt, options.concept, options.replacement)
    # They are the same if the concept is there only after the pipeline has cleaned the prompt.
    is_prompt = any(map(str.isalnum, replacement)) and replacement != request.prompt
    return replace(request, instead=replacement) if is_prompt else request


def _check_lines(options: PrepareOptions, group: str, where: str, lines: Sequence[PromptLine]) -> None:
    """Checks the prompts of a group.

    That target prompts contain the concept is checked again when they are cleaned and tokenized.
    """
    concept = options.concept
    without = [line.instead for line in lines if line.instead is not None]
    if group == KEPT:
        without += [line.prompt for line in lines]
    else:
        for line in lines:
            if not occurrences(line.prompt, concept):
                _refuse_other_forms(concept, line.prompt, where)
    for text in without:
        _refuse_concept(concept, text, where)
    _warn_of_similar_words(concept, without, where)
    if len(lines) > options.num_trajectories:
        warnings.warn(
            f"{where}: only {options.num_trajectories} of {len(lines)} prompts are used; raise num_trajectories to use "
            "them all",
            stacklevel=4,
        )
    repeated = [line for index, line in enumerate(lines) if line in lines[:index]]
    if repeated:
        warnings.warn(
            f"{where}: {shown(repeated[0].prompt)} is there more than once, so it counts more than other prompts",
            stacklevel=4,
        )


def read_video_requests(folder: str | os.PathLike[str], concept: str) -> list[Request]:
    """One request per video in a folder: of group "target" if its prompt contains the concept, else of "kept".

    A video is a file in one of the formats of `_VIDEOS`, such as `NAME.mp4`, or its latents in `NAME.safetensors`. Its
    prompt is in `NAME.txt`, optionally followed by a tab and a prompt without the concept. Warns of files that are
    skipped or have the same name but for their suffix, and of words that resemble the concept in a prompt without it.

    Raises:
        FileNotFoundError: the folder or a video's prompt does not exist.
        ValueError: there are no videos, a text file has more than one prompt or the concept after the tab, or a prompt
            has the concept only in another form, such as its plural.
    """
    folder = expand_home(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of videos, got {str(folder)!r}")
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    sources = [path for path in visible if path.suffix.lower() in (*_VIDEOS, _LATENTS) and path.is_file()]
    if not sources:
        raise ValueError(f"data: expected {', '.join(_VIDEOS)} or {_LATENTS} files in {str(folder)!r}, got none")
    texts = {path.stem: path for path in visible if path.suffix.lower() == ".txt"}
    prompt_files = [texts.get(source.stem, source.with_suffix(".txt")) for source in sources]
    requests = [_read_video_request(*files, concept) for files in zip(sources, prompt_files, strict=True)]
    without = [request.prompt for request in requests if request.group == KEPT]
    without += [request.instead for request in requests if request.instead is not None]
    _warn_of_similar_words(concept, without, f"data: {folder}")
    counts = Counter(prompt_files)
    sharing = [source.name for source, file in zip(sources, prompt_files, strict=True) if counts[file] > 1]
    if sharing:
        warnings.warn(
            f"data: {_listed(sharing)} in {str(folder)!r} share a prompt file; each counts as a video of its own",
            stacklevel=3,
        )
    skipped = [path.name for path in visible if path not in {*sources, *prompt_files}]
    if skipped:
        warnings.warn(
            f"data: skipped {_listed(skipped)} in {str(folder)!r}: neither a video ({', '.join(_VIDEOS)}), nor latents "
            f"({_LATENTS}), nor the prompt of one (.txt)",
            stacklevel=3,
        )
    return requests


def _read_video_request(source: Path, prompt_file: Path, concept: str) -> Request:
    lines = read_prompts(prompt_file)
    if len(lines) != 1:
        raise ValueError(f"{prompt_file}: expected one prompt, got {len(lines)}")
    prompt, instead = lines[0]
    if instead is not None:
        _refuse_concept(concept, instead, str(prompt_file), " after the tab")
    if occurrences(prompt, concept):
        return Request(prompt, "target", instead, source=source)
    _refuse_other_forms(concept, prompt, str(prompt_file))
    return Request(prompt, KEPT, instead, source=source)


def _refuse_concept(concept: str, text: str, where: str, place: str = "") -> None:
    """Checks a prompt that must not contain the concept, nor another form of it."""
    forms = other_forms(text, concept)
    if occurrences(text, concept):
        raise ValueError(f"{where}: expected a prompt without {shown(concept)}{place}, got {shown(text)}")
    if forms:
        raise ValueError(
            f"{where}: expected a prompt without {shown(concept)}{place}, got {shown(forms[0])}, a form of it, "
            f"in {shown(text)}"
        )


def _refuse_other_forms(concept: str, text: str, where: str) -> None:
    """Checks a prompt without the concept: whether it has another form of it, so that what is meant is unclear."""
    forms = other_forms(text, concept)
    if forms:
        raise ValueError(
            f"{where}: expected {shown(concept)} as a word of its own or not at all, got {shown(forms[0])} in "
            f"{shown(text)}; if the concept is meant, write {shown(concept)} as well, so that it is found and erased; "
            "if not, use other words"
        )


def _warn_of_similar_words(concept: str, texts: Iterable[str], where: str) -> None:
    """Warns if prompts that count as without the concept have words that might mean it."""
    words = list(dict.fromkeys(word for text in texts for word in similar_words(text, concept)))
    if words:
        warnings.warn(
            f"{where}: {_listed(words)} count as other words than {shown(concept)}; if the concept is meant, write "
            f"{shown(concept)} as a word of its own, and in the target prompts",
            stacklevel=4,
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    """Names in quotation marks, of which the first few are shown."""
    further = f" and {len(names) - most} others" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + further


def distinct_prompts(requests: Sequence[Request], negative_prompt: str) -> list[str]:
    """Every prompt whose condition the trajectories need, each once. The negative prompt comes last if it is new."""
    wanted = [prompt for request in requests for prompt in (request.prompt, request.instead) if prompt is not None]
    return list(dict.fromkeys([*wanted, negative_prompt]))
