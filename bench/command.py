"""What the benchmark commands share: options, one-line errors, and the report that they write."""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastunlearn.bench.agreement import Disagreement
from fastunlearn.environment import describe
from fastunlearn.files import expand_home, write_json
from fastunlearn.option_parser import OptionParser

MOST = 1_000_000  # runs, or steps


def option_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m COMMAND` that knows `--device` and `--output`."""
    parser = OptionParser(prog=f"python -m {command}", description=description)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="NAME",
        help="run on this torch device, such as cpu or cuda:1 (default: cuda if there is a GPU, else cpu)",
    )
    parser.add_argument(
        "--output",
        type=expand_home,
        metavar="FILE",
        help="also write the results to this JSON file (default: only print)",
    )
    return parser


@contextmanager
def one_line_errors(command: str, *kinds: type[Exception]) -> Iterator[None]:
    """Ends the process with a one-line message if peers disagree, or at an error of one of these kinds."""
    try:
        yield
    except Disagreement as error:
        sys.exit(f"{command}: results disagree, so no time is reported: {error}")
    except kinds as error:
        sys.exit(f"{command}: {error}")


def check_counts(options: argparse.Namespace, **least: int) -> None:
    """Checks that numbers given on the command line are large enough, and small enough for a run that ends.

    Args:
        options: the parsed options.
        least: the smallest allowed value, by the option's name.

    Raises:
        ValueError: an option is below its smallest value, or above a million.
    """
    for name, value in least.items():
        given = getattr(options, name)
        if not value <= given <= MOST:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number from {value} to {MOST}, got {given}")


def write_report(path: Path | None, command: str, arguments: Sequence[str] | None, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, together with the command, commit, machine and versions. Does nothing without a path.

    Args:
        path: the file to write, or None.
        command: the module that was run.
        arguments: its arguments; None for those of the process.
        results: what was measured.
    """
    if path is None:
        return
    provenance = {
        "command": shlex.join(["python", "-m", command, *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": _commit(),
        "machine": platform.processor() or platform.machine(),
        "environment": describe().splitlines(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, provenance | dict(results))
    print(f"wrote {path}")


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
