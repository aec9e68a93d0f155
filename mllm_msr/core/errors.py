"""Errors meant for a user's eyes: what was expected, what came, where, and what to do.

A stage prints the message of a :class:`UserError` as one line and exits with code 1; every other
exception is a defect of ours and keeps its traceback.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import TracebackType

INTERRUPTED = 130  # exit code of what Ctrl-C ended, as shells have it
INTERRUPTION = "interrupted; run again to go on"

LONGEST_SHOWN = 300  # characters of a path or URL in a message


class UserError(Exception):
    """A condition that the user can mend; the message is the whole explanation."""

    def __init__(self, *, expected: str, got: str, where: str, fix: str) -> None:
        """Compose the one-line message.

        Args:
            expected: What the program needed.
            got: What it found instead.
            where: File, row, column or key at which it was found.
            fix: What the user can do about it.
        """
        self.expected, self.got, self.where, self.fix = expected, got, where, fix
        parts = (f"{where}: expected {expected}", f"got {got}", fix)
        super().__init__(" ".join("; ".join(parts).split()))


class ParamsError(UserError):
    """``params.yaml`` or ``prompts.yaml`` does not say what the program can use."""


class DataError(UserError):
    """A raw file, an image or a table is not what its reader needs."""


class ModelError(UserError):
    """A model, tokenizer or adapter cannot be used as asked."""


def shorten(text: str) -> str:
    """Cut the middle out of a path or URL that is too long for a message."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:120]}…{text[-60:]} ({len(text):,} characters)"


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the program with one line: code 1 of an error meant for the user, 130 of Ctrl-C.

    Typer turns Ctrl-C into this exit code without a word.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{INTERRUPTION}\n")
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            sys.stderr.write(f"{INTERRUPTION}\n")
        raise
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


def end_imports_in_one_line() -> None:
    """Make Ctrl-C during the imports of a program one line, before the program can catch it."""

    def explain(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(f"{INTERRUPTION}\n")
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain
