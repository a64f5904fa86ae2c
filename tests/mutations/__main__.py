"""Mutates every file that the library reads, one at a time, and shows what the commands make of it.

    python tests/mutations --count 1000 --seed 0
    python tests/mutations --seed 0 --only 123     # one mutation again, with what it printed

Each mutation changes one file of one command (`cases.py`) in one way (`edits.py`): flipped bytes, another type of file,
another value in JSON, another tensor. Three of ten mutations make the checksums fit the damage again, as an attacker
would. Then the command runs in a forked process with bounded time and memory (`judging.py`).

A command may end in one of these ways:

    refused         a non-zero status, and one line on stderr, after any warnings
    same result     the mutation touched nothing that is read, or what was lost could be made again
    warned          another result, with a warning
    other input     another result, from a file of the user's: prompts, videos and their captions, a base model, erasers
                    of a format without checksums, or any file that a mutation made to fit its checksums again

and in none of these: a traceback, a signal, a hang, several lines or a very long one, foreign code, a write outside the
output folder, or a *silent difference*: another result from a file that the library wrote, without a word.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 60.0  # seconds of one command, which takes about one
RESIGNED = 0.3
GOOD = ("refused", "same result", "warned", "other input")


class Report(NamedTuple):
    """One mutation and what came of it."""

    number: int
    case: str
    file: str
    edit: str
    outcome: str
    stderr: str


def _isolate(folder: Path) -> None:
    """Keeps the libraries off the network and in `folder`, before they are imported."""
    home = folder / "home"
    home.mkdir(parents=True)
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR"):
        os.environ[name] = str(home)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "tmp"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")


def _import_everything() -> None:
    """Imports what the commands import, so that no forked process has to."""
    import diffusers
    import torch
    import transformers

    from fastunlearn.families import FAMILIES

    commands = ("demo.run", *(f"training.{name}" for name in ("prepare", "train", "evaluate", "sample")))
    for module in ("accelerate", "ftfy", "imageio_ffmpeg", *(f"fastunlearn.{command}" for command in commands)):
        importlib.import_module(module)
    torch.set_num_threads(1)
    for family in FAMILIES:
        for name in (family.pipeline, family.transformer, family.vae):
            getattr(diffusers, name)
    for name in ("T5EncoderModel", "T5Tokenizer", "UMT5EncoderModel", "LlamaModel", "CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    # Commands collect garbage. Looking through all that was imported would take half a second, and copy its pages.
    gc.collect()
    gc.freeze()


class Bench:
    """The folders of all runs. `room` holds the files of one run, and is watched: nothing else in it may change."""

    def __init__(self, folder: Path) -> None:
        self.room, self.pristine, self.logs = folder / "room", folder / "pristine", folder / "logs"
        self.world, self.outside, self.modules = (self.room / name for name in ("world", "outside", "modules"))
        self.sentinel = self.room / "sentinel"
        for path in (self.room, self.logs, self.outside, self.modules):
            path.mkdir(exist_ok=True)
        payload = f"import pathlib\npathlib.Path({str(self.sentinel)!r}).touch()\nclass Component: ...\n"
        (self.modules / "mutation_payload.py").write_text(payload)
        sys.path.append(str(self.modules))

    def make(self) -> None:
        """Makes the files that all runs start from."""
        from cases import Case, digests, make_world
        from judging import run

        self.world.mkdir()

        def call(arguments: Sequence[str]) -> None:
            case = Case("", tuple(arguments), (), (), (), digests())
            done = run(case, self.world, self.logs, self.sentinel, TIMEOUT)
            if done.status != 0:
                sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")

        make_world(self.world, call)
        self.world.rename(self.pristine)

    def reset(self, case) -> None:  # type: ignore[no-untyped-def]
        """Makes the world as it was."""
        for folder in (self.world, self.outside):
            shutil.rmtree(folder, ignore_errors=True)
        self.sentinel.unlink(missing_ok=True)
        self.outside.mkdir()
        shutil.copytree(self.pristine, self.world)


def mutations(bench: Bench, numbers: Iterable[int], seed: int, commands: tuple[str, ...]) -> Iterable[Report]:
    """Makes the mutations with these numbers, one after the other."""
    from cases import CASES, Case, Result, files_in
    from checksums import resign
    from editing import NotApplicable, Room
    from edits import choose_edit
    from judging import Run, fault, outcome, run, snapshot

    normal: dict[str, tuple[Run, Result]] = {}
    cases = [case for case in CASES if case.name.startswith(commands)]

    def attempt(case: Case) -> tuple[Run, str | None]:
        outputs = [bench.world / name for name in case.outputs]
        before = snapshot(bench.room, outputs)
        done = run(case, bench.world, bench.logs, bench.sentinel, TIMEOUT)
        return done, fault(case, done, before, snapshot(bench.room, outputs), bench.sentinel)

    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        case = rng.choice(cases)
        if case.name not in normal:
            bench.reset(case)
            done, wrong = attempt(case)
            if wrong is not None or done.status != 0:
                sys.exit(f"{case.name}, unmutated: {wrong}\n{done.stderr}")
            normal[case.name] = done, case.result(bench.world)
        while True:
            bench.reset(case)
            outputs = [bench.world / name for name in case.outputs]
            files = files_in(*(bench.world / name for name in case.inputs))
            path = rng.choice(files)
            name = str(path.relative_to(bench.world))
            is_pipeline = any(folder.joinpath("model_index.json").is_file() for folder in path.parents)
            edit = choose_edit(rng, path, is_pipeline=is_pipeline)
            try:
                edit(rng, path, Room(files, outputs, bench.outside, bench.modules, bench.sentinel))
                break
            except (NotApplicable, ValueError, RuntimeError, TypeError, OverflowError):
                continue
        resigned = rng.random() < RESIGNED and path.is_file() and path.stat().st_size < 1 << 24 and resign(path)
        done, wrong = attempt(case)
        is_own = resigned or any(name.startswith(prefix) for prefix in case.own)
        if wrong is None:
            try:
                result = case.result(bench.world) if done.status == 0 else None
            except Exception as error:  # no result although the command said that it succeeded
                result = {"error": repr(error)}
            usual, expected = normal[case.name]
            wrong = outcome(done, usual, result, expected, is_own)
            if wrong == "silent difference":
                names = sorted(
                    name for name in {**expected, **(result or {})} if result.get(name) != expected.get(name)
                )
                done = done._replace(stderr=f"{done.stderr}\nother: {', '.join(names)}")
        what = edit.__name__ + (", checksums made to fit" if resigned else "")
        yield Report(number, case.name, name, what, wrong, done.stderr)


def table(reports: Sequence[Report]) -> str:
    """How many mutations of each command ended how."""
    counts = Counter((report.case, report.outcome) for report in reports)
    bad = sorted({report.outcome for report in reports} - set(GOOD))
    columns = [*GOOD, *bad]
    names = list(dict.fromkeys(case for case, _ in sorted(counts)))
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{column:>{len(column) + 3}}" for column in columns)]
    for name in names:
        cells = (f"{counts[name, column] or '':>{len(column) + 3}}" for column in columns)
        lines.append(f"{name:<{width}}" + "".join(cells))
    totals = Counter(report.outcome for report in reports)
    lines.append(f"{'total':<{width}}" + "".join(f"{totals[column]:>{len(column) + 3}}" for column in columns))
    return "\n".join(lines)


def main() -> None:
    """Runs the mutations that the command line asks for; exits with 1 if one of them ended badly."""
    parser = argparse.ArgumentParser(prog="python tests/mutations", description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="number of mutations (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the mutations (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one (%(default)s)")
    parser.add_argument("--seconds", type=float, metavar="X", help="stop early after X seconds of mutations")
    parser.add_argument("--command", nargs="+", default=[""], metavar="NAME", help="only commands whose rows start so")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only these, with what they print")
    options = parser.parse_args()
    numbers = options.only or range(options.first, options.first + options.count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        _isolate(folder)
        _import_everything()
        bench = Bench(folder)
        bench.make()
        reports = []
        start = time.monotonic()
        for report in mutations(bench, numbers, options.seed, tuple(options.command)):
            reports.append(report)
            if options.only or report.outcome not in GOOD:
                lines = report.stderr.strip().splitlines()
                text = report.stderr if options.only else (lines[-1][:300] if lines else "")
                print(
                    f"{report.number}: {report.case}: {report.file}: {report.edit}: {report.outcome}: {text}",
                    flush=True,
                )
            if options.seconds is not None and time.monotonic() - start > options.seconds:
                break
    print(table(reports))
    if any(report.outcome not in GOOD for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
