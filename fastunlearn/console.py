"""How a command speaks to its user: one line for a warning, an error or an interruption, on any console."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fastunlearn.files import one_line

LONGEST = 1000  # letters of a message
_INTERRUPTED, _READER_LEFT = 130, 141  # what shells report for a process that SIGINT, and SIGPIPE, ended
_CLEAR_LINE = "\r\x1b[K"  # of a terminal, where a progress bar may be


@contextmanager
def one_line_messages(command: str) -> Iterator[None]:
    """Makes one line, after the command's name, of warnings, of errors that a user can mend, and of Ctrl-C.

    Errors end the process with status 1, Ctrl-C with 130. If the reader of the output leaves, as `head` does, the
    process ends silently with 141. Letters that the console cannot show are printed as escapes with backslashes.

    Args:
        command: what the user typed, such as "fastunlearn train".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    format_of_python = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: _warning(command, str(message)) + "\n"
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes the stream once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(_READER_LEFT) from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"{command}: {error}; it needs the train extra: pip install 'fastunlearn[train]'") from None
    except (ImportError, ValueError, OSError, MemoryError, FloatingPointError) as error:
        said = "out of memory" if isinstance(error, MemoryError) and not str(error) else error
        raise SystemExit(f"{command}: {one_line(said, LONGEST)}") from None
    finally:
        warnings.formatwarning = format_of_python


def quiet_libraries(command: str) -> None:
    """Makes what diffusers and transformers log one line each, and leaves a single progress bar for loading a model."""

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return _warning(command, record.getMessage(), record.levelname.lower())

    for library in ("transformers", "diffusers"):
        logger = importlib.import_module(f"{library}.utils.logging").get_logger(library)
        for handler in logger.handlers:
            handler.setFormatter(OneLine())
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    if not sys.warnoptions:
        # Written for those libraries' own developers.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch|diffusers|transformers|huggingface_hub")


def _warning(command: str, message: str, level: str = "warning") -> str:
    start = _CLEAR_LINE if sys.stderr is not None and sys.stderr.isatty() else ""
    return f"{start}{command}: {level}: {one_line(message, LONGEST)}"
