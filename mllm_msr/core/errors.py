"""Errors for users: what was expected, what was found, where, and what to do, on one line.

A stage prints the message of a :class:`UserError` and exits with code 1. Any other exception is a
bug in this project and keeps its traceback.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

INTERRUPT_EXIT_CODE = 130  # 128 + SIGINT, as shells report Ctrl-C
INTERRUPT_MESSAGE = "interrupted; run again to continue"

MAX_SHOWN_LENGTH = 300  # characters of a path or URL in a message
# Substrings of a RuntimeError's message when memory runs out: MPS and other accelerators, CPU on
# Linux or macOS, CPU on Windows, cuBLAS and cuDNN.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",
)


class UserError(Exception):
    """A problem that the user can fix; the message is the whole explanation."""

    def __init__(self, *, expected: str, got: str, where: str, fix: str) -> None:
        """Compose the one-line message.

        Args:
            expected: What the program needed.
            got: What it found instead.
            where: The file, row, column or setting where it was found.
            fix: What to do about it.
        """
        self.expected, self.got, self.where, self.fix = expected, got, where, fix
        parts = (f"{where}: expected {expected}", f"got {got}", fix)
        super().__init__(escape(" ".join("; ".join(parts).split())))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts of the message, for the workers of a cluster."""
        parts = {"expected": self.expected, "got": self.got, "where": self.where, "fix": self.fix}
        return functools.partial(type(self), **parts), ()


class ParamsError(UserError):
    """A setting, prompt template, environment variable or argument is invalid."""


class DataError(UserError):
    """A raw file, an image or a table is missing, damaged or malformed."""


class UnknownError(DataError):
    """A user, an item or an image that was asked for does not exist."""


class ModelError(UserError):
    """A model, tokenizer or adapter cannot be loaded or used as configured."""


def escape(text: str) -> str:
    """Escape characters that are not printable: a terminal would obey some of them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shorten(text: str) -> str:
    """Shorten a long path or URL for a message by cutting out its middle; escape its text."""
    text = escape(text)
    if len(text) <= MAX_SHOWN_LENGTH:
        return text
    return f"{text[:120]}…{text[-60:]} ({len(text):,} characters)"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    Only CUDA has its own exception for that in torch, which is not imported here; the others are
    told by their message.
    """
    if isinstance(error, RuntimeError):
        is_cuda = type(error).__name__ == "OutOfMemoryError"
        return is_cuda or any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
    return isinstance(error, MemoryError)


@contextlib.contextmanager
def explain_out_of_memory(what: str, where: str, fix: str) -> Iterator[None]:
    """Turn running out of memory within the block into a one-line error.

    Args:
        what: What the memory was needed for.
        where: The model or setting to name.
        fix: What to do about it.

    Raises:
        ModelError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            expected=f"memory for {what}", got="too little", where=where, fix=fix
        ) from error


def install_command(extra: str) -> str:
    """Return the command that adds an extra and keeps the checkout and its tested versions."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


@contextlib.contextmanager
def report_errors_on_one_line() -> Iterator[None]:
    """Print a user error or Ctrl-C on one line and exit with code 1 or 130.

    Raises:
        SystemExit: The block raised a :class:`UserError` or was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{INTERRUPT_MESSAGE}\n")
        raise SystemExit(INTERRUPT_EXIT_CODE) from None
    except SystemExit as end:
        if end.code == INTERRUPT_EXIT_CODE:  # Typer turns Ctrl-C into this code, printing nothing
            sys.stderr.write(f"{INTERRUPT_MESSAGE}\n")
        raise
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


def report_interrupts_on_one_line() -> None:
    """Print an uncaught Ctrl-C on one line, as during a program's imports."""

    def print_exception(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write(f"{INTERRUPT_MESSAGE}\n")
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = print_exception
