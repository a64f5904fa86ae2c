"""What commands print when something is wrong: one line, on any console, and no traceback."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastunlearn.console import one_line_messages, quiet_libraries
from fastunlearn.files import replace_file

COMMAND = "fastunlearn train"


def message_of(error: BaseException) -> str:
    """The message that the process ends with after `error`."""
    with pytest.raises(SystemExit) as exit_info, one_line_messages(COMMAND):
        raise error
    return str(exit_info.value.code)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("rank: expected\n  a number,\tgot 'a'"), "rank: expected a number, got 'a'"),
        (FloatingPointError("loss: expected finite"), "loss: expected finite"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 1 TiB"), "Unable to allocate 1 TiB"),
        (OSError(errno.ENOSPC, "No space left on device", "cache/a"), "[Errno 28] No space left on device: 'cache/a'"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 10**6 + "; do that"), "x" * 500 + " ... " + "x" * 491 + "; do that"),
        (ImportError("libcudart.so: not found"), "libcudart.so: not found"),
        (
            ModuleNotFoundError("No module named 'diffusers'"),
            "No module named 'diffusers'; it needs the train extra: pip install 'fastunlearn[train]'",
        ),
    ],
)
def test_an_error_is_one_line(error: Exception, message: str) -> None:
    assert message_of(error) == f"{COMMAND}: {message}"


def test_a_mistake_in_the_code_keeps_its_traceback() -> None:
    with pytest.raises(AttributeError), one_line_messages(COMMAND):
        raise AttributeError("a bug")


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(SystemExit) as exit_info, one_line_messages(COMMAND):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == f"{COMMAND}: interrupted\n"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", rb"\u72d7 \u2192 \xe9"), ("cp1252", b"\\u72d7 \\u2192 \xe9")]
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_letters_that_the_console_lacks_are_escaped(
    name: str, encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(console, encoding=encoding, newline="\n"))
    with one_line_messages(COMMAND):
        print("狗 → é", file=getattr(sys, name), flush=True)
    assert console.getvalue() == expected + b"\n"


def test_letters_that_no_encoding_has_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="utf-8", newline="\n"))
    with one_line_messages(COMMAND):
        print(os.fsdecode(b"\xff.txt"))  # a file's name need not be text
    assert console.getvalue() == b"\\udcff.txt\n"


def test_a_process_without_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with one_line_messages(COMMAND):
        print("to nobody")
    assert message_of(ValueError("rank")) == f"{COMMAND}: rank"


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) as error_info:
        replace_file(tmp_path / "index.json", b"{}")
    assert message_of(error_info.value) == f"{COMMAND}: [Errno 28] No space left on device: '{tmp_path}/index.json'"
    assert list(tmp_path.iterdir()) == []


def run_python(code: str, **options: object) -> subprocess.Popen[str]:
    """Starts Python on `code`, inside `one_line_messages`."""
    lines = ["import os, sys, warnings", "from fastunlearn.console import one_line_messages"]
    lines += [f"with one_line_messages({COMMAND!r}):", *(f"    {line}" for line in code.splitlines())]
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def test_warnings_are_one_line_and_a_reader_that_leaves_is_no_error() -> None:
    process = run_python("warnings.warn('two\\n  lines')\nprint('a line\\n' * 10**5)", stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == f"{COMMAND}: warning: two lines\n"
    assert process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = run_python("print('a line')", stdout=full)
        assert process.stderr.read() == f"{COMMAND}: [Errno 28] No space left on device\n"
        assert process.wait() == 1


def test_the_libraries_log_one_line_each() -> None:
    quiet_libraries(COMMAND)
    for library in ("diffusers", "transformers"):
        record = logging.LogRecord(library, logging.WARNING, "file.py", 1, "ignored:\n  %s", ("sample_size",), None)
        formatted = {handler.format(record) for handler in logging.getLogger(library).handlers}
        assert formatted == {f"{COMMAND}: warning: ignored: sample_size"}


def test_a_warning_says_nothing_of_python() -> None:
    with one_line_messages(COMMAND):
        assert warnings.formatwarning("no kept prompts", UserWarning, "a.py", 3) == (
            f"{COMMAND}: warning: no kept prompts\n"
        )
    assert "UserWarning" in warnings.formatwarning("no kept prompts", UserWarning, "a.py", 3)
