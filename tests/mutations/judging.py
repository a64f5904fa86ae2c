"""Runs a command in a forked process within bounds of time and memory, and judges what it did."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import stat
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cases import Case, Result

MEMORY = 3 << 30  # bytes beyond those of the process that is forked
FILE_SIZE = 256 << 20
MOST_TEXT = 600  # characters of an error's line
MOST_STDERR = 20_000
# Programs that commands start: the video coder, and what `platform` asks for the machine's name.
_PROGRAMS = re.compile(r"ffmpeg[^/]*|uname|git|lscpu|ldconfig|gcc|cc|file|sh")
_STARTS = frozenset(("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"))
_PROGRESS = re.compile(r"^\s*[^|]*\d+%\||\d+(\.\d+)?\s*(it|s|step|batch|point|unit)s?/(s|it|step|batch|point)|^\s*$")


class Run(NamedTuple):
    """What a command did: its exit status (None: killed after too long a time), its stderr, and seconds."""

    status: int | None
    stderr: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without progress bars."""
        return [line for line in re.split(r"[\r\n]", self.stderr) if not _PROGRESS.search(line)]


def run(case: Case, world: Path, logs: Path, sentinel: Path, timeout: float) -> Run:
    """Runs the case's command in a child of this process, in the folder `world`."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        _child(case, world, logs, sentinel)
    status = None
    while status is None and time.monotonic() - start < timeout:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.005)
    # The command's own children too, such as ffmpeg: the child leads a process group of its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    text = (logs / "stderr").read_bytes()[: 4 << 20].decode(errors="backslashreplace")
    return Run(status, text, time.monotonic() - start)


def _child(case: Case, world: Path, logs: Path, sentinel: Path) -> None:
    """Becomes the command."""
    status = 99
    try:
        os.setpgid(0, 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            descriptor = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.addaudithook(_watch(sentinel))
        os.chdir(world)
        status = _status_of(case)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status_of(case: Case) -> int:
    """The exit status of the command, which ends as Python ends it."""
    from fastunlearn.cli import main

    case.prepare()
    try:
        main(case.arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _watch(sentinel: Path):  # type: ignore[no-untyped-def]
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        program = arguments[0] if event == "subprocess.Popen" else None
        starts_program = program is not None and not _PROGRAMS.fullmatch(os.path.basename(str(program)))
        if event in _STARTS or event == "socket.connect" or starts_program:
            sentinel.write_text(f"{event} {arguments}")

    return hook


Snapshot = dict[str, tuple[object, ...]]


def snapshot(folder: Path, without: Sequence[Path]) -> Snapshot:
    """What is in a folder, except in some places: type, size and time of everything."""
    entries: Snapshot = {}
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as listing:
            for entry in listing:
                if Path(entry.path) in without:
                    continue
                facts = entry.stat(follow_symlinks=False)
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder:
                    pending.append(Path(entry.path))
                size = 0 if is_folder else facts.st_size
                entries[entry.path] = (stat.S_IFMT(facts.st_mode), size, 0 if is_folder else facts.st_mtime_ns)
    return entries


def fault(case: Case, done: Run, before: Snapshot, after: Snapshot, sentinel: Path) -> str | None:
    """What no mutation may lead to, whatever was mutated; None if the command behaved."""
    if sentinel.exists():
        return "code ran"
    if before != after:
        return "wrote outside"
    if done.status is None:
        return "hang"
    if done.status < 0:
        return f"killed by signal {-done.status}"
    if "Traceback (most recent call last)" in done.stderr:
        return "traceback"
    if len(done.stderr) > MOST_STDERR:
        return "long stderr"
    if done.status == 0:
        return None
    command = f"fastunlearn {case.arguments[0]}: "
    if not done.lines or not done.lines[-1].startswith(command):
        return "no line, or several"
    if len(done.lines[-1]) > MOST_TEXT:
        return "long line"
    errors = [line for line in done.lines if line.startswith(command) and "warning" not in line]
    return "several errors" if len(errors) > 1 else None


def outcome(done: Run, normal: Run, result: Result | None, expected: Result, is_own: bool) -> str:
    """How a command that behaved took the mutation; "silent difference" is the one that must not be."""
    if done.status:
        return "refused"
    if result == expected:
        return "same result"
    if is_own:
        return "other input"
    return "warned" if set(done.lines) - set(normal.lines) else "silent difference"
