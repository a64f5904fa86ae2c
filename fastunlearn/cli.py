"""The command line: `fastunlearn prepare`, `train`, `evaluate`, `sample`, `demo`, `verify`, `bench` and `env`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

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
BENCHMARKS = ("kernels", "traffic", "algorithms", "training")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line, where argparse prints the usage too."""
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Accepts `--max_train_steps`, as diffusers' scripts spell options, for `--max-train-steps`."""
        if args is not None:
            args = [_with_hyphens(argument) for argument in args]
        return super().parse_known_args(args, namespace)


def _with_hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


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
    for field in dataclasses.fields(options_class):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_option(groups[title], field, types_of_fields[field.name])
    parser.set_defaults(run=_run_phase, options_class=options_class, module=module)


def _add_option(group: Any, field: dataclasses.Field[Any], type_hint: Any) -> None:
    if typing.get_origin(type_hint) in (typing.Union, types.UnionType):
        (type_hint,) = (member for member in typing.get_args(type_hint) if member is not type(None))
    option = "--" + field.name.replace("_", "-")
    default = field.default
    help_text = field.metadata["help"]
    keywords: dict[str, Any] = {"dest": field.name}
    if type_hint is bool:
        keywords["action"] = "store_false" if default else "store_true"
        option = f"--no-{option[2:]}" if default else option
    elif typing.get_origin(type_hint) is Literal:
        keywords["choices"] = typing.get_args(type_hint)
        keywords["metavar"] = "NAME"
        help_text += ": " + ", ".join(typing.get_args(type_hint))
    else:
        if typing.get_origin(type_hint) in (list, tuple):
            keywords["nargs"] = "+"
            type_hint = typing.get_args(type_hint)[0]
        keywords["type"] = type_hint
        keywords["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(type_hint, "TEXT")
    if default is dataclasses.MISSING:
        keywords["required"] = True
        help_text += " (required)"
    else:
        keywords["default"] = default
        if default is not None and default not in ("", ()) and not isinstance(default, bool):
            help_text += f" ({default})"
    group.add_argument(option, help=help_text.replace("%", "%%"), **keywords)


def _run_phase(arguments: argparse.Namespace) -> None:
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments.options_class)}
    with _one_line_errors(arguments.command):
        options = arguments.options_class(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )
        importlib.import_module(arguments.module).run(options)


@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """Exits with one line for errors that a user can fix, a missing `train` extra among them."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"fastunlearn {command}: {error}; it needs the train extra: pip install 'fastunlearn[train]'"
        ) from None
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        raise SystemExit(f"fastunlearn {command}: {error}") from None


def _bench(options: argparse.Namespace) -> None:
    importlib.import_module(f"fastunlearn.bench.{options.name}").main(options.arguments)


def _demo(options: argparse.Namespace) -> None:
    with _one_line_errors(options.command):
        from fastunlearn.demo.run import run, table

        report = run(options.concept, options.output, options.seed, options.device)
    print(table(report))
    print(f"\nwrote {options.output / 'demo.png'}, {options.output / 'demo.json'} and {options.output / 'erasers'}")


def _verify(options: argparse.Namespace) -> None:
    import torch

    from fastunlearn.devices import usable_device
    from fastunlearn.testing.verify import verify

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [getattr(torch, dtype) for dtype in options.dtype]
    try:
        passed = verify(usable_device(name), options.op, dtypes, options.backend)
    except ValueError as error:
        raise SystemExit(f"fastunlearn verify: {error}") from None
    if not passed:
        raise SystemExit(1)


def _env(options: argparse.Namespace) -> None:
    from fastunlearn.environment import describe

    print(describe())


def _add_demo(commands: Any, shapes: Sequence[str]) -> None:
    demo = _add_command(
        commands,
        "demo",
        "erase a shape from a tiny video model and see the result, on a CPU in minutes",
        "Erases a shape from a tiny video model, and compares the same videos before and after.",
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
        type=Path,
        default=Path("fastunlearn-demo"),
        metavar="PATH",
        help="folder for the report, the picture and the erasers (%(default)s)",
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

    parser = _Parser(
        prog="fastunlearn",
        description="Erase a concept from a text-to-video diffusion transformer.",
        epilog="`fastunlearn COMMAND --help` lists the options of a command.",
        formatter_class=_WideHelp,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in PHASES:
        _add_phase(commands, command)
    _add_demo(commands, SHAPES)
    _add_verify(commands, OPS)
    bench = commands.add_parser("bench", help="measure this machine: speed, memory traffic, algorithms, training steps")
    bench.add_argument("name", choices=BENCHMARKS, help="the benchmark to run")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the benchmark; --help lists them")
    bench.set_defaults(run=_bench)
    env = commands.add_parser("env", help="print versions, devices and backends, for bug reports")
    env.set_defaults(run=_env)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. An error that a user can fix prints one line to stderr and exits with a non-zero status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
