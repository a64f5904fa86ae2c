"""The parser of every command's options: one line for a mistake, with what may have been meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from fastunlearn.console import LONGEST
from fastunlearn.files import one_line, shown


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes `--max_train_steps`, as diffusers' scripts spell it, for `--max-train-steps`.

    The start of a name is enough where only one option starts so.
    """

    def error(self, message: str) -> NoReturn:
        """Exits with one line, where argparse prints the usage too."""
        self.exit(2, f"{self.prog}: {one_line(message.removeprefix('argument '), LONGEST)}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what it does not know, although argparse's method of this name returns it."""
        given = [_with_hyphens(argument) for argument in (sys.argv[1:] if args is None else args)]
        self._refuse_unknown_options(given)
        namespace, unknown = super().parse_known_args(given, namespace)
        if unknown:
            self.error(f"unexpected {unknown[0]!r}; a value that has spaces needs quotes")
        return namespace, unknown

    def _refuse_unknown_options(self, arguments: Sequence[str]) -> None:
        """Before argparse does, which would first miss the option that was meant."""
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            arguments = list(takewhile(lambda argument: argument.startswith("-"), arguments))  # the rest is a command's
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for argument in arguments:
            name = argument.partition("=")[0]
            is_option = name.startswith("--") and " " not in name  # as argparse sees it
            if is_option and not any(option.startswith(name) for option in options):
                self.error(f"unknown option {name}{_did_you_mean(name, options) or '; --help lists the options'}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kinds = {int: "a whole number", float: "a number"}
        if action.type not in kinds:
            return super()._get_value(action, arg_string)
        try:
            return action.type(arg_string)
        except ValueError:
            raise argparse.ArgumentError(action, f"expected {kinds[action.type]}, got {shown(arg_string)}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            listed = ", ".join(repr(choice) if "," in choice else choice for choice in choices)
            raise argparse.ArgumentError(
                action, f"expected one of {listed}, got {value!r}{_did_you_mean(str(value), choices)}"
            )


def _did_you_mean(word: str, possible: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, possible, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _with_hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value
