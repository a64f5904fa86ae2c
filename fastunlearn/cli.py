"""The command line: `fastunlearn prepare`, `train`, `evaluate`, `sample`, `demo`, `verify`, `bench` and `env`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastunlearn.console import one_line_messages, quiet_libraries
from fastunlearn.environment import installed_version
from fastunlearn.files import expand_home
from fastunlearn.option_parser import OptionParser

BACKENDS = ("torch", "compile", "triton")

# Command -> the class of its options in `fastunlearn.training.options`, the module whose `run` takes them, and the
# command's line in `fastunlearn --help`.
PHASES = {
    "prepare": (
        "PrepareOptions",
        "fastunlearn.training.prepare",
        "run the frozen model once and cache what training needs",
    ),
    "train": ("TrainingOptions", "fastunlearn.training.train", "train erasers from the cache"),
    "evaluate": (
        "EvaluateOptions",
        "fastunlearn.training.evaluate",
        "measure what erasers erase and what they keep",
    ),
    "sample": (
        "SampleOptions",
        "fastunlearn.training.sample",
        "generate videos without and with erasers, from the same noise",
    ),
}
# Benchmark -> its line in `fastunlearn bench --help`.
BENCHMARKS = {
    "kernels": "time of the losses, against plain PyTorch",
    "traffic": "bytes that the kernels move, against the fewest possible",
    "algorithms": "low-rank localization and concept attention, alone and in whole models",
    "training": "a training step, against a published one",
    "recipes": "what the defaults, the paper's settings and others erase from the demo's models",
}
_HIDDEN: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}


def _with_help_option(arguments: Sequence[str]) -> list[str]:
    """`COMMAND --help` for `help COMMAND` and `COMMAND help`; `--help` for nothing, and for `bench` alone."""
    given = list(arguments)
    is_help = "help" in given and not any(argument.startswith("-") for argument in given)
    if is_help or given in ([], ["bench"]):
        return [*(argument for argument in given if argument != "help"), "--help"]
    return given


class _WideHelp(argparse.HelpFormatter):
    """Gives an option one line wherever its help text fits."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=132)


def _add_command(commands: Any, command: str, help_line: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        command,
        help=help_line,
        description=f"{description} Defaults are in parentheses.",
        formatter_class=_WideHelp,
        usage=f"fastunlearn {command} [option ...]",
    )
    return parser


def _add_phase(commands: Any, command: str) -> None:
    """Adds a command whose options are the fields of a dataclass, under the headings that the fields name."""
    from fastunlearn.training import options as option_classes

    name, module, help_line = PHASES[command]
    options_class = getattr(option_classes, name)
    parser = _add_command(commands, command, help_line, options_class.__doc__.strip().splitlines()[0])
    groups: dict[str, Any] = {}
    types_of_fields = typing.get_type_hints(options_class)
    takes_recipe = "recipe" in types_of_fields
    if takes_recipe:
        tested = "They were chosen on the demo's model and tested on two others of its size, none of full size."
        parser.description = f"{parser.description} {tested}"
    for field in dataclasses.fields(options_class):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], field, types_of_fields[field.name], takes_recipe=takes_recipe)
    parser.set_defaults(run=_run_phase, options_class=options_class, module=module)


def _add_option(group: Any, field: dataclasses.Field[Any], type_hint: Any, *, takes_recipe: bool) -> None:
    """Adds an option, which the parsed arguments have only if it was given.

    A recipe may give what is required, and switch on what has to be switched off again.
    """
    if typing.get_origin(type_hint) in (typing.Union, types.UnionType):
        (type_hint,) = (member for member in typing.get_args(type_hint) if member is not type(None))
    option = "--" + field.name.replace("_", "-")
    default = field.default
    help_text = field.metadata["help"]
    keywords: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    if type_hint is bool:
        keywords["action"] = "store_false" if default else "store_true"
        opposite = f"--no-{option[2:]}"
        option, opposite = (opposite, option) if default else (option, opposite)
        if takes_recipe:
            action = "store_true" if default else "store_false"
            group.add_argument(opposite, dest=field.name, action=action, **_HIDDEN)
    elif typing.get_origin(type_hint) is Literal:
        keywords["choices"] = typing.get_args(type_hint)
        keywords["metavar"] = "NAME"
        help_text += ": " + ", ".join(typing.get_args(type_hint))
    else:
        if typing.get_origin(type_hint) in (list, tuple):
            keywords |= {"nargs": "+", "action": "extend"}  # an option given twice must not lose its first values
            type_hint = typing.get_args(type_hint)[0]
        keywords["type"] = type_hint
        keywords["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(type_hint, "TEXT")
    if default is dataclasses.MISSING:
        keywords["required"] = not takes_recipe
        help_text += " (required)"
    elif default is not None and default not in ("", ()) and not isinstance(default, bool):
        help_text += f" ({default})"
    group.add_argument(option, help=help_text.replace("%", "%%"), **keywords)


def _run_phase(arguments: argparse.Namespace) -> None:
    options_class = arguments.options_class
    names = {field.name for field in dataclasses.fields(options_class)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in names
    }
    if "recipe" in names:
        from fastunlearn.training.data.recipe import with_recipe

        options = with_recipe(options_class, given.pop("recipe", None), **given)
    else:
        options = options_class(**given)
    quiet_libraries(f"fastunlearn {arguments.command}")
    importlib.import_module(arguments.module).run(options)


def _bench(options: argparse.Namespace) -> None:
    importlib.import_module(f"fastunlearn.bench.{options.name}").main(options.arguments)


def _demo(options: argparse.Namespace) -> None:
    from fastunlearn.demo.report import table
    from fastunlearn.demo.run import RECIPE, run

    quiet_libraries("fastunlearn demo")
    report = run(options.concept, options.output, options.seed, options.device, options.recipe or RECIPE)
    print(f"\n{table(report)}")
    print(f"\nwrote demo.gif, demo.png, demo.json and what the commands have made to {options.output}")


def _verify(options: argparse.Namespace) -> None:
    import torch

    from fastunlearn.devices import usable_device
    from fastunlearn.testing.verify import verify

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [getattr(torch, dtype) for dtype in options.dtype]
    if not verify(usable_device(name), options.op, dtypes, options.backend):
        raise SystemExit(1)


def _env(options: argparse.Namespace) -> None:
    from fastunlearn.environment import describe

    print(describe())


def _add_demo(commands: Any, shapes: Sequence[str]) -> None:
    demo = _add_command(
        commands,
        "demo",
        "erase a shape from a tiny video model and see the result, on a CPU in minutes",
        "Erases a shape from a tiny video model by prepare and train, and compares the same videos before and after.",
    )
    demo.add_argument(
        "--concept",
        choices=shapes,
        default="circle",
        metavar="NAME",
        help=f"shape to erase: {', '.join(shapes)} (%(default)s)",
    )
    demo.add_argument(
        "--output",
        type=expand_home,
        default=Path("fastunlearn-demo"),
        metavar="PATH",
        help="folder for the report, the pictures, and all that the commands read and write (%(default)s)",
    )
    demo.add_argument(
        "--recipe",
        type=expand_home,
        metavar="PATH",
        help="recipe of prepare and train; demo/recipe.toml in the package if left out",
    )
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of training and videos (%(default)s)"
    )
    demo.add_argument("--device", default="cpu", metavar="TEXT", help="torch device, such as cuda:1 (%(default)s)")
    demo.set_defaults(run=_demo)


def _add_verify(commands: Any, ops: Sequence[str]) -> None:
    from fastunlearn.dtypes import FLOATING, dtype_name

    dtypes = [dtype_name(dtype) for dtype in FLOATING]
    verify = _add_command(
        commands,
        "verify",
        "check every operation on a device against a float64 oracle",
        "Checks operations on a device against a float64 oracle in NumPy.",
    )
    verify.add_argument(
        "--device", metavar="TEXT", help="torch device, such as cuda:1; if left out, cuda if there is one, else cpu"
    )
    verify.add_argument(
        "--op",
        nargs="+",
        choices=ops,
        default=ops,
        metavar="NAME",
        help=f"one or more of the operations {', '.join(ops)}; all if left out",
    )
    verify.add_argument(
        "--dtype",
        nargs="+",
        choices=dtypes,
        default=dtypes,
        metavar="NAME",
        help=f"one or more dtypes of the inputs: {', '.join(dtypes)}; all if left out",
    )
    verify.add_argument(
        "--backend",
        choices=BACKENDS,
        metavar="NAME",
        help=f"implementation to check: {', '.join(BACKENDS)}; if left out, the one that the library would choose",
    )
    verify.set_defaults(run=_verify)


def _parser() -> argparse.ArgumentParser:
    from fastunlearn.demo.world import SHAPES
    from fastunlearn.ops.dispatch import OPS

    parser = OptionParser(
        prog="fastunlearn",
        description="Erase a concept from a text-to-video diffusion transformer.",
        epilog="`fastunlearn COMMAND --help` lists the options of a command.",
        formatter_class=_WideHelp,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"fastunlearn {installed_version('fastunlearn') or '(version unknown: not installed)'}",
        help="print the version and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in PHASES:
        _add_phase(commands, command)
    _add_demo(commands, SHAPES)
    _add_verify(commands, OPS)
    bench = commands.add_parser(
        "bench",
        help="measure this machine: speed, memory traffic, algorithms, training steps",
        description="Runs a benchmark.\n\n" + "\n".join(f"  {name:<12}{line}" for name, line in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="fastunlearn bench NAME [option ...]",
    )
    bench.add_argument("name", choices=BENCHMARKS, metavar="NAME", help="the benchmark to run")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="option", help="as `bench NAME --help` lists them"
    )
    bench.set_defaults(run=_bench)
    env = commands.add_parser("env", help="print versions, devices and backends, for bug reports")
    env.set_defaults(run=_env)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; prints the help if there is none.

    An error that a user can fix prints one line to stderr and exits with a non-zero status.
    """
    with one_line_messages("fastunlearn"):
        options = _parser().parse_args(_with_help_option(sys.argv[1:] if arguments is None else arguments))
    with one_line_messages(f"fastunlearn {options.command}"):
        options.run(options)


if __name__ == "__main__":
    main()
