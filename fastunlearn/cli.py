"""The command line: `fastunlearn demo`, `fastunlearn verify` and `fastunlearn env`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

DTYPES = ("float16", "bfloat16", "float32", "float64")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and a line."""
        self.exit(2, f"{self.prog}: {message}\n")


def _demo(options: argparse.Namespace) -> None:
    try:
        from fastunlearn.demo.run import run, table
    except ImportError as error:
        raise SystemExit(
            f"fastunlearn demo: {error}; it needs the train extra: pip install 'fastunlearn[train]'"
        ) from None
    _check_device(options)
    try:
        report = run(options.concept, options.output, options.seed, options.device)
    except OSError as error:
        raise SystemExit(f"fastunlearn demo: {error}") from None
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
    from fastunlearn.dispatch import OPS

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
    verify = commands.add_parser("verify", help="check every operation on a device against a float64 oracle")
    verify.add_argument("--device", metavar="D", help="as torch names it (default: cuda if there is one, else cpu)")
    verify.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="NAME", help=f"of {', '.join(OPS)}")
    verify.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}"
    )
    verify.add_argument("--backend", choices=("torch", "compile", "triton"), help="default: as in use")
    verify.set_defaults(run=_verify)
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
