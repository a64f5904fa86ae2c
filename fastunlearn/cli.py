"""The command line: `fastunlearn demo` and `fastunlearn env`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and a line."""
        self.exit(2, f"{self.prog}: {message}\n")


def _demo(options: argparse.Namespace) -> None:
    import torch

    try:
        from fastunlearn.demo.run import run, table
    except ImportError as error:
        raise SystemExit(
            f"fastunlearn demo: {error}; it needs the train extra: pip install 'fastunlearn[train]'"
        ) from None
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"fastunlearn demo: --device {options.device} cannot be used: {reason}") from None
    try:
        report = run(options.concept, options.output, options.seed, options.device)
    except OSError as error:
        raise SystemExit(f"fastunlearn demo: {error}") from None
    print(table(report))
    print(f"\nwrote {options.output / 'demo.png'}, {options.output / 'demo.json'} and {options.output / 'erasers'}")


def _env(options: argparse.Namespace) -> None:
    from fastunlearn.environment import describe

    print(describe())


def _parser() -> argparse.ArgumentParser:
    from fastunlearn.demo.world import SHAPES

    parser = _Parser(prog="fastunlearn", description="Erase a concept from a text-to-video diffusion transformer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser("demo", help="erase a shape from a tiny video model and see it gone, on a CPU")
    demo.add_argument("--concept", choices=SHAPES, default="circle", help="what to erase (default: %(default)s)")
    demo.add_argument(
        "--output", type=Path, default=Path("fastunlearn-demo"), metavar="DIR", help="default: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--device", default="cpu", metavar="D", help="as torch names it: cpu, cuda, ... (default: cpu)")
    demo.set_defaults(run=_demo)
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
