"""The command line: `fastunlearn prepare`, `train`, `evaluate`, `sample`, `demo`, `verify`, `bench` and `env`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import runpy
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

DTYPES = ("float16", "bfloat16", "float32", "float64")


# Command -> its options in `fastunlearn.training.options`, the module whose `run` takes them, and what it does.
PHASES = {
    "prepare": ("PrepareOptions", "fastunlearn.training.prepare", "ask the frozen model once what training will need"),
    "train": ("TrainingOptions", "fastunlearn.training.train", "train erasers from what was prepared"),
    "evaluate": ("EvaluateOptions", "fastunlearn.training.evaluate", "measure what erasers erase, and what they keep"),
    "sample": ("SampleOptions", "fastunlearn.training.sample", "make videos before and after, from the same seeds"),
}
BENCHMARKS = ("kernels", "traffic", "algorithms", "training")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and a line."""
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Takes `--max_train_steps` for `--max-train-steps`: diffusers' scripts spell their options so."""
        if args is not None:
            args = [_with_hyphens(argument) for argument in args]
        return super().parse_known_args(args, namespace)


def _with_hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


class _OneLineEach(argparse.HelpFormatter):
    """Every option on a line of its own, so that a command's help is a screen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=132)


def _add_phase(commands: Any, command: str) -> None:
    """A command whose options are the fields of a dataclass."""
    from fastunlearn.training import options as every_options

    name, module, help_line = PHASES[command]
    options_class = getattr(every_options, name)
    parser = commands.add_parser(
        command,
        help=help_line,
        description=options_class.__doc__.strip().splitlines()[0],
        formatter_class=_OneLineEach,
        usage=f"fastunlearn {command} [option ...]",
    )
    for field, kind in zip(dataclasses.fields(options_class), _resolved_types(options_class), strict=True):
        _add_option(parser, field, kind)
    parser.set_defaults(run=_run_phase, options_class=options_class, module=module)


def _resolved_types(options_class: type) -> list[Any]:
    hints = typing.get_type_hints(options_class)
    return [hints[field.name] for field in dataclasses.fields(options_class)]


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any) -> None:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    option = "--" + field.name.replace("_", "-")
    default = field.default
    help_line = field.metadata["help"]
    keywords: dict[str, Any] = {"dest": field.name}
    if default is dataclasses.MISSING:
        keywords["required"] = True
    else:
        keywords["default"] = default
        if default is not None and default not in ("", ()) and not isinstance(default, bool):
            help_line += f" ({default})"
    if kind is bool:
        keywords["action"] = "store_false" if default else "store_true"
        option = f"--no-{option[2:]}" if default else option
    elif typing.get_origin(kind) is Literal:
        keywords["choices"] = typing.get_args(kind)
        keywords["metavar"] = "NAME"
        help_line += ": " + ", ".join(typing.get_args(kind))
    else:
        if typing.get_origin(kind) in (list, tuple):
            keywords["nargs"] = "+"
            kind = typing.get_args(kind)[0]
        keywords["type"] = kind
        keywords["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
    parser.add_argument(option, help=help_line.replace("%", "%%"), **keywords)


def _run_phase(options: argparse.Namespace) -> None:
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options.options_class)}
    with _one_line_errors(options.command):
        chosen = options.options_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        importlib.import_module(options.module).run(chosen)


@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """For commands that need the train extra."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"fastunlearn {command}: {error}; it needs the train extra: pip install 'fastunlearn[train]'"
        ) from None
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        raise SystemExit(f"fastunlearn {command}: {error}") from None


def _bench(options: argparse.Namespace) -> None:
    sys.argv[1:] = options.arguments
    runpy.run_module(f"fastunlearn.bench.{options.name}", run_name="__main__", alter_sys=True)


def _demo(options: argparse.Namespace) -> None:
    with _one_line_errors(options.command):
        from fastunlearn.demo.run import run, table

        _check_device(options)
        report = run(options.concept, options.output, options.seed, options.device)
    print(table(report))
    print(f"\nwrote {options.output / 'demo.png'}, {options.output / 'demo.json'} and {options.output / 'erasers'}")


def _check_device(options: argparse.Namespace) -> None:
    import torch

    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"fastunlearn {options.command}: --device {options.device} cannot be used: {reason}") from None


def _verify(options: argparse.Namespace) -> None:
    import torch

    from fastunlearn.testing.verify import verify

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(options)
    dtypes = [getattr(torch, name) for name in options.dtype]
    try:
        passed = verify(torch.device(options.device), options.op, dtypes, options.backend)
    except ValueError as error:
        raise SystemExit(f"fastunlearn verify: {error}") from None
    if not passed:
        raise SystemExit(1)


def _env(options: argparse.Namespace) -> None:
    from fastunlearn.environment import describe

    print(describe())


def _parser() -> argparse.ArgumentParser:
    from fastunlearn.demo.world import SHAPES
    from fastunlearn.ops.dispatch import OPS

    parser = _Parser(prog="fastunlearn", description="Erase a concept from a text-to-video diffusion transformer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in PHASES:
        _add_phase(commands, command)
    demo = commands.add_parser("demo", help="erase a shape from a tiny video model and see it gone, on a CPU")
    demo.add_argument("--concept", choices=SHAPES, default="circle", help="what to erase (default: %(default)s)")
    demo.add_argument(
        "--output", type=Path, default=Path("fastunlearn-demo"), metavar="DIR", help="default: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--device", default="cpu", metavar="D", help="as torch names it: cpu, cuda, ... (default: cpu)")
    demo.set_defaults(run=_demo)
    verify = commands.add_parser("verify", help="check every operation on a device against a float64 oracle")
    verify.add_argument("--device", metavar="D", help="as torch names it (default: cuda if there is one, else cpu)")
    verify.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="NAME", help=f"of {', '.join(OPS)}")
    verify.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}"
    )
    verify.add_argument("--backend", choices=("torch", "compile", "triton"), help="default: as in use")
    verify.set_defaults(run=_verify)
    bench = commands.add_parser("bench", help="measure this machine: speed, memory traffic, algorithms, training")
    bench.add_argument("name", choices=BENCHMARKS, help="which benchmark")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="its own options; --help shows them")
    bench.set_defaults(run=_bench)
    env = commands.add_parser("env", help="print versions, devices and backends: what a bug report needs")
    env.set_defaults(run=_env)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. Errors that a user can mend are one line on stderr and a non-zero exit."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
