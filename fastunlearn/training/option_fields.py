"""Makes the fields of option classes: their metadata, checks of their values, and the fields that commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any

from fastunlearn.files import expand_home

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


def at_least(least: int) -> Check:
    """Makes a check that a number is finite and at least `least`."""

    def check(name: str, value: float) -> None:
        if not least <= value < math.inf:
            raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")

    return check


def is_finite(name: str, value: float) -> None:
    """Checks that a number is neither NaN nor infinite."""
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def is_seed(name: str, value: int) -> None:
    """Checks that a random seed is one that all generators accept."""
    # torch's CPU generator reads only 32 bits of a seed, so two larger seeds could be the same.
    if not 0 <= value < 2**32:
        raise ValueError(f"{name}: expected a number from 0 to below 2^32, got {value!r}")


def is_fraction(name: str, value: float) -> None:
    """Checks that a number is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")


def is_fraction_below_1(name: str, value: float) -> None:
    """Checks that a number is from 0 to below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {value!r}")


def has_words(name: str, value: str) -> None:
    """Checks that a text is not blank."""
    if not value.strip():
        raise ValueError(f"{name}: expected one or more words, got {value!r}")


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


def pipeline(help: str = "the diffusers pipeline: a folder, or a name on the Hugging Face Hub", **metadata: Any) -> Any:
    """The pipeline to load."""
    return option(help, group="model", is_path=True, **metadata)


def erasers() -> Any:
    """The folders of the erasers to load."""
    return option("one or more folders of erasers, which are applied together", group="model")


def eraser_scales() -> Any:
    """The strengths of these erasers."""
    return option("strength of the erasers of each folder, in the same order; 1 for all if left out", (), group="model")


def mixed_precision(help: str = "precision of the model, where no means float32", **metadata: Any) -> Any:
    """The precision of the model."""
    return option(help, "bf16", group="model", **metadata)


def device(
    help: str = "torch device, such as cuda:1; if left out, an accelerator if available, else the CPU", **metadata: Any
) -> Any:
    """The device of the model."""
    return option(help, None, group="model", **metadata)


def num_trajectories(default: int) -> Any:
    """The number of sampled trajectories."""
    help = "trajectories to sample for the target prompts, and as many again for the kept prompts"
    return option(help, default, group="sampling", check=at_least(1))


def timesteps_per_trajectory(default: int) -> Any:
    """The number of points per trajectory."""
    help = "timesteps of each trajectory at which a point is stored"
    return option(help, default, group="sampling", check=at_least(1))


def num_inference_steps() -> Any:
    """The number of sampling steps."""
    return option("sampling steps per trajectory or video", 50, group="sampling", check=at_least(1))


def guidance_scale() -> Any:
    """The scale of classifier-free guidance."""
    help = "scale of classifier-free guidance in sampling; the pipeline's default if left out"
    return option(help, None, group="sampling", check=is_finite)


def height() -> Any:
    """The height of the videos."""
    help = "height of the videos in pixels; the pipeline's default if left out"
    return option(help, None, group="sampling", check=at_least(1))


def width() -> Any:
    """The width of the videos."""
    help = "width of the videos in pixels; the pipeline's default if left out"
    return option(help, None, group="sampling", check=at_least(1))


def num_frames() -> Any:
    """The number of frames per video."""
    help = "number of frames per video; the pipeline's default if left out"
    return option(help, None, group="sampling", check=at_least(1))
