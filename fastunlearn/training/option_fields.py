"""Makes the fields of option classes: their metadata, checks of their values, and the fields that commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any

from fastunlearn.files import expand_home, shown

Check = Callable[[str, Any], None]  # takes an option's name and value, and raises ValueError


def option(
    help: str,
    default: Any = MISSING,
    *,
    group: str,
    check: Check | None = None,
    free_on_resume: bool = False,
    is_path: bool = False,
) -> Any:
    """Makes a dataclass field that is an option; the option is required if it has no default.

    Args:
        help: what the option does, its unit, and what happens if it is left out. The command line appends the default.
        default: the default of the field.
        group: the heading that `--help` lists the option under.
        check: checks the value.
        free_on_resume: whether a run that resumes from a checkpoint may have another value than the interrupted run.
        is_path: whether a string may be a path. A `Path` always is one.
    """
    metadata = {
        "help": help,
        "group": group,
        "check": check,
        "free_on_resume": free_on_resume,
        "is_path": is_path,
    }
    return field(default=default, metadata=metadata)


def whole(least: int, most: int) -> Check:
    """Makes a check that a number is whole, and from `least` to `most`."""

    def check(name: str, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {_shown_number(value)}")

    return check


def within(least: float, most: float) -> Check:
    """Makes a check that a number is finite, and from `least` to `most`."""

    def check(name: str, value: float) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:  # NaN fails too
            raise ValueError(f"{name}: expected a number from {least:g} to {most:g}, got {_shown_number(value)}")

    return check


def below_1(name: str, value: float) -> None:
    """Checks that a number is from 0 to below 1."""
    within(0, 1)(name, value)
    if value == 1:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {shown(value)}")


def each(check: Check) -> Check:
    """Makes a check of every value of a tuple."""

    def check_all(name: str, values: Iterable[Any]) -> None:
        for value in values:
            check(name, value)

    return check_all


def _shown_number(value: Any) -> str:
    is_long = isinstance(value, int) and value.bit_length() > 256  # Python refuses to write out numbers that are longer
    return "a longer number" if is_long else shown(value)


# torch's CPU generator reads only 32 bits of a seed, so two larger seeds could be the same.
is_seed = whole(0, 2**32 - 1)
is_fraction = within(0, 1)
# Far beyond what anyone needs, and below what overflows anywhere: a slip of the finger fails by the option's name.
is_size = whole(1, 2**16)  # of a dimension: pixels, frames, samples of a batch, the rank of a matrix
is_count = whole(1, 10**9)  # of what happens one after the other
is_count_or_0 = whole(0, 10**9)
is_steps = whole(1, 10_000)  # of sampling; schedules have 1000
is_trajectories = whole(1, 10**6)
is_scale = within(-1000, 1000)
is_rate = within(0, 1000)
is_weight = within(0, 1e6)


def has_words(name: str, value: str) -> None:
    """Checks that a text is not blank."""
    if not value.strip():
        raise ValueError(f"{name}: expected one or more words, got {shown(value)}")


def check_fields(options: Any) -> None:
    """Runs the check of every option that has one; an option with the default None may be None."""
    for option_field in fields(options):
        check, value = option_field.metadata["check"], getattr(options, option_field.name)
        may_be_none = option_field.default is None
        if check is not None and not (value is None and may_be_none):
            check(option_field.name, value)


def expand_homes(options: Any) -> None:
    """Puts the user's home folder in the place of a leading `~` in every option that is a path."""
    for option_field in fields(options):
        value = getattr(options, option_field.name)
        if isinstance(value, tuple):
            expanded: Any = tuple(expand_home(element) if isinstance(element, Path) else element for element in value)
        elif isinstance(value, Path):
            expanded = expand_home(value)
        elif isinstance(value, str) and option_field.metadata["is_path"]:
            expanded = os.path.expanduser(value)
        else:
            continue
        object.__setattr__(options, option_field.name, expanded)  # the classes are frozen


# The options that several commands share, as functions because every class needs a field object of its own.


def pipeline(help: str = "the diffusers pipeline: a folder, a name on the Hub, or demo", **metadata: Any) -> Any:
    """The pipeline to load, or the demo's little model."""
    return option(help, group="model", is_path=True, **metadata)


def trust_remote_code() -> Any:
    """Whether the pipeline may run code."""
    help = "let the pipeline run code of its own: only if you trust whoever made it"
    return option(help, False, group="model", free_on_resume=True)


def erasers() -> Any:
    """The folders of the erasers to load."""
    return option("one or more folders of erasers, which are applied together", group="model")


def eraser_scales() -> Any:
    """The strengths of these erasers."""
    help = "strength of the erasers of each folder, in the same order; 1 for all if left out"
    return option(help, (), group="model", check=each(is_scale))


def mixed_precision(help: str = "precision of the model, where no means float32", **metadata: Any) -> Any:
    """The precision of the model."""
    return option(help, "bf16", group="model", **metadata)


def device(
    help: str = "torch device, such as cuda:1; if left out, an accelerator if available, else the CPU", **metadata: Any
) -> Any:
    """The device of the model."""
    return option(help, None, group="model", **metadata)


def recipe() -> Any:
    """The file with defaults of the options."""
    help = (
        "TOML file with options, with underscores, in tables [prepare] and [train], which those given here override "
        "(a switch by --NAME or --no-NAME), and with groups of target prompts, each headed [[targets]]; see "
        "fastunlearn/training/data/recipe.py"
    )
    return option(help, None, group="data", free_on_resume=True)


def overwrite_output_dir(help: str, group: str, **metadata: Any) -> Any:
    """Whether results of an earlier run may be replaced; named as in the scripts of transformers."""
    return option(help, False, group=group, **metadata)


def negative_prompt() -> Any:
    """The prompt that guidance leads away from."""
    help = "negative prompt of sampling; with --baseline negative, it also stands for the absence of the concept"
    return option(f"{help}; empty if left out", "", group="sampling")


def replacement() -> Any:
    """What comes in the place of the concept's words."""
    help = (
        "what replaces the concept's words in a target prompt, to stand for the absence of the concept; if left out, "
        "they are dropped, and where nothing else is left, the negative prompt is taken"
    )
    return option(help, "", group="data")


def baseline() -> Any:
    """The prompt of the velocity without the concept."""
    help = (
        "prompt of the velocity without the concept: the target prompt with the replacement, or the negative prompt, "
        "as in the paper; a prompt after a tab comes before both"
    )
    return option(help, "replacement", group="data")


def num_trajectories(default: int) -> Any:
    """The number of sampled trajectories."""
    help = "trajectories to sample for the target prompts, and as many again for the kept prompts"
    return option(help, default, group="sampling", check=is_trajectories)


def timesteps_per_trajectory(default: int) -> Any:
    """The number of points per trajectory."""
    help = "timesteps of each trajectory at which a point is stored"
    return option(help, default, group="sampling", check=is_steps)


def num_inference_steps() -> Any:
    """The number of sampling steps."""
    return option("sampling steps per trajectory or video", 50, group="sampling", check=is_steps)


def guidance_scale() -> Any:
    """The scale of classifier-free guidance."""
    help = "scale of classifier-free guidance in sampling; the pipeline's default if left out"
    return option(help, None, group="sampling", check=is_scale)


def height() -> Any:
    """The height of the videos."""
    help = "height of the videos in pixels; the pipeline's default if left out"
    return option(help, None, group="sampling", check=is_size)


def width() -> Any:
    """The width of the videos."""
    help = "width of the videos in pixels; the pipeline's default if left out"
    return option(help, None, group="sampling", check=is_size)


def num_frames() -> Any:
    """The number of frames per video."""
    help = "number of frames per video; the pipeline's default if left out"
    return option(help, None, group="sampling", check=is_size)
