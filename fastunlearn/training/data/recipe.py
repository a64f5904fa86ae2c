"""Recipe files: defaults of the options of `prepare` and `train`, and groups of target prompts, in TOML.

    [prepare]                            # options of prepare, with underscores
    concept = "nude"
    kept_prompts = "kept.txt"            # paths are relative to the recipe's folder

    [train]                              # options of train
    max_train_steps = 1000

    [[targets]]                          # a group of target prompts; see `Targets` for its keys
    name = "alone"
    prompts = ["a nude person"]          # or target_prompts = "alone.txt"
    negative_guidance_scale = 1.0

What is given on the command line, or to `with_recipe`, comes before the recipe's tables, but after what a group sets
for itself. Comments are the place for reasons. An options class whose `recipe` is set without `with_recipe` has the
recipe's groups, but its own defaults.
"""

from __future__ import annotations

import difflib
import sys
import types
import typing
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from fastunlearn.files import expand_home, one_line, read_file, shown
from fastunlearn.training import option_fields as shared
from fastunlearn.training.data.prompts import PromptLine, parse_prompts, read_prompts
from fastunlearn.training.option_fields import each, has_words, is_fraction, is_scale, option, within
from fastunlearn.training.options import PrepareOptions, TargetGroup, TrainingOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEPT = "kept"  # the group of the prompts that must not change; all other groups are targets
_LARGEST = 4 << 20  # bytes
Options = TypeVar("Options", PrepareOptions, TrainingOptions)


@dataclass(frozen=True)
class Targets:
    """A group of target prompts in a recipe. Options that are None are as for all groups.

    `prepare` reads the prompts and how to sample them; `train` reads `negative_guidance_scale` and `share`.
    """

    name: str = option("name of the group in the cache", group="data", check=has_words)
    prompts: tuple[str, ...] = option("the prompts, as the lines of a file of prompts", (), group="data")
    target_prompts: Path | None = option("a file of prompts instead", None, group="data")
    replacement: str | None = option("as the option of prepare", None, group="data")
    baseline: Literal["replacement", "negative"] | None = option("as the option of prepare", None, group="data")
    follow_replacement: float | None = option("as the option of prepare", None, group="sampling", check=is_fraction)
    num_trajectories: int | None = option(
        "trajectories to sample for this group", None, group="sampling", check=shared.is_trajectories
    )
    steps: tuple[float, ...] = option(
        "start and end, from 0 to 1, of the part of the sampling steps that points are taken from",
        (0.0, 1.0),
        group="sampling",
        check=each(is_fraction),
    )
    negative_guidance_scale: float | None = option("as the option of train", None, group="losses", check=is_scale)
    share: float = option(
        "how often a step trains on this group, relative to the others", 1.0, group="losses", check=within(1e-6, 1e6)
    )

    def __post_init__(self) -> None:
        if self.name == KEPT:
            raise ValueError(f"name: expected another name than {KEPT!r}, which is that of the kept prompts")
        if bool(self.prompts) == (self.target_prompts is not None):
            got = "both" if self.prompts else "neither"
            raise ValueError(f"prompts: expected either prompts or target_prompts, got {got}")
        if len(self.steps) != 2 or self.steps[0] >= self.steps[1]:
            raise ValueError(f"steps: expected a start below an end, both from 0 to 1, got {shown(list(self.steps))}")

    def lines(self, recipe: Path) -> list[PromptLine]:
        """The prompts. Raises what `read_prompts` raises."""
        if self.target_prompts is not None:
            return read_prompts(self.target_prompts)
        return parse_prompts(self.prompts, f"{recipe}, prompts of {shown(self.name)}")

    def options(self, options: PrepareOptions) -> PrepareOptions:
        """The options of `prepare` for this group."""
        names = ("replacement", "baseline", "follow_replacement", "num_trajectories")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(options, **own)


class Recipe(NamedTuple):
    """The content of a recipe file: options of `prepare` and of `train`, by name, and the groups of target prompts."""

    prepare: dict[str, Any]
    train: dict[str, Any]
    targets: tuple[Targets, ...]


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe file, and checks the type and the range of every value in it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a file, or not TOML; a table or an option is unknown; a value has the wrong type or is out
            of range; two groups have one name. The message names the file, the table and the option.
    """
    path = expand_home(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a recipe, but there is no such file")
    text = read_file(path, _LARGEST)
    try:
        content = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a recipe in TOML, got {one_line(error, 200)}") from error
    tables = {"prepare": PrepareOptions, "train": TrainingOptions}
    _check_names(f"{path}", "table", content, (*tables, "targets"))
    options = {
        name: _values(f"{path}: [{name}]", content.get(name, {}), options_class, path.parent)
        for name, options_class in tables.items()
    }
    groups = content.get("targets", [])
    if not isinstance(groups, list):
        raise ValueError(f"{path}: expected groups that are headed [[targets]], got {shown(groups)}")
    targets = tuple(_group(f"{path}: [[targets]] {number}", group, path) for number, group in enumerate(groups, 1))
    names = [group.name for group in targets]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: [[targets]]: expected groups of different names, got {shown(names)}")
    return Recipe(options["prepare"], options["train"], targets)


def with_recipe(options_class: type[Options], recipe: Path | str | None = None, **given: Any) -> Options:
    """The options of `prepare` or `train`: those that are given, else those of the recipe, else the defaults.

    Raises:
        ValueError: a required option is missing, or is not as its help says.
        Others: what `read_recipe` raises.
    """
    values = given
    if recipe is not None:
        recipe = expand_home(recipe)
        read = read_recipe(recipe)
        values = (read.prepare if options_class is PrepareOptions else read.train) | given | {"recipe": recipe}
    missing = [f for f in fields(options_class) if f.default is MISSING and f.name not in values]
    if missing:
        names = ", ".join("--" + option_field.name.replace("_", "-") for option_field in missing)
        raise ValueError(f"the following arguments are required, here or in a recipe: {names}")
    return options_class(**values)


def target_groups(options: TrainingOptions, groups: Iterable[str]) -> tuple[TargetGroup, ...]:
    """The groups of target points to train on: those of the recipe, or else the group "target".

    Args:
        options: the options of training.
        groups: the names of the groups in the cache.

    Raises:
        ValueError: the target groups of the recipe are not those of the cache, or there is none for a cache that has
            others than "target".
        Others: what `read_recipe` raises.
    """
    recipe = () if options.recipe is None else read_recipe(options.recipe).targets
    names, cached = sorted(group.name for group in recipe), sorted(set(groups) - {KEPT})
    if not recipe:
        default_group = TargetGroup(guidance_scale=options.negative_guidance_scale)
        if cached and default_group.name not in cached:
            raise ValueError(
                f"recipe: expected the one that the cache was prepared with, whose target groups are {shown(cached)}, "
                "got none"
            )
        others = [name for name in cached if name != default_group.name]
        if others:
            warnings.warn(
                "recipe: expected the one that the cache was prepared with, got none; only the group "
                f"{shown(default_group.name)} is trained on, not {shown(others)}",
                stacklevel=3,
            )
        return (default_group,)
    if names != cached:
        raise ValueError(
            f"recipe: expected the target groups of the cache, {shown(cached)}, got {shown(names)} in "
            f"{options.recipe}; give train the recipe that the cache was prepared with"
        )
    default = options.negative_guidance_scale
    return tuple(
        TargetGroup(
            group.name,
            default if group.negative_guidance_scale is None else group.negative_guidance_scale,
            group.share,
        )
        for group in recipe
    )


def _group(where: str, table: Any, path: Path) -> Targets:
    values = _values(where, table, Targets, path.parent)
    if "name" not in values:
        raise ValueError(f"{where}: expected a name, got none")
    try:
        return Targets(**values)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _values(where: str, table: Any, options_class: type[Any], folder: Path) -> dict[str, Any]:
    """The values of a table as the fields of `options_class` take them."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table, got {shown(table)}")
    hints = typing.get_type_hints(options_class)
    known = {option_field.name: option_field for option_field in fields(options_class) if option_field.name != "recipe"}
    _check_names(where, "option", table, known)
    values = {}
    for name, value in table.items():
        metadata = known[name].metadata
        try:
            values[name] = _converted(name, value, hints[name])
            if metadata["check"] is not None:
                metadata["check"](name, values[name])
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        values[name] = _located(values[name], folder, metadata["is_path"])
    return values


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A TOML value as a field of a type takes it: a path for a string, a tuple for an array, a float for an integer."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (member for member in typing.get_args(hint) if member is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected an array, got {shown(value)}")
        return tuple(_converted(name, element, typing.get_args(hint)[0]) for element in value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            expected = ", ".join(map(repr, typing.get_args(hint)))
            raise ValueError(f"{name}: expected one of {expected}, got {shown(value)}")
        return value
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    is_fit = isinstance(value, (int, float) if hint is float else str if hint is Path else hint)
    if not is_fit or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name}: expected {kinds.get(hint, 'a string')}, got {shown(value)}")
    if hint is float and abs(value) <= sys.float_info.max:  # a larger integer is out of every range
        return float(value)
    return Path(value) if hint is Path else value


def _located(value: Any, folder: Path, may_be_path: bool) -> Any:
    """A path relative to `folder`; also a string that may be a path, if there is such a file or folder."""
    if isinstance(value, tuple):
        return tuple(_located(element, folder, may_be_path) for element in value)
    if isinstance(value, Path):
        return folder / expand_home(value)
    if may_be_path and value and (path := folder / expand_home(value)).exists():
        return str(path)
    return value


def _check_names(where: str, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            raise ValueError(f"{where}: unknown {what} {shown(name)}{one_line(hint, 200)}")
