"""The standard streams: nothing raw reaches a terminal, and a stream that cannot be written to is one line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

from cpd_onnx.errors import OutputError

PIPE_CLOSED = 141
"""Exit code where nobody reads on, as of a program that SIGPIPE ends: 128 + 13."""


def printable(text: str) -> str:
    r"""The text with escapes for what a terminal obeys or cannot show: control characters, line breaks, stray bytes.

    Names in models and of files come from others: an escape sequence in one could recolour, move or retitle a terminal,
    and a line break could pass for a line of ours.

    >>> print(printable("a\x1b[2Jb\n"))
    a\x1b[2Jb\n
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def output_error(error: OSError | None) -> OutputError:
    """The error for standard output that cannot be written to; it is closed if there is no error."""
    reason = "it is closed" if error is None else error.strerror or str(error)
    is_pipe = error is not None and error.errno == errno.EPIPE
    return OutputError(f"cannot write to standard output: {reason}", is_pipe=is_pipe)


def write_out(text: str) -> None:
    """Write to standard output; raises OutputError where that fails."""
    if sys.stdout is None:
        raise output_error(None)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise output_error(error) from error


def flush_out() -> None:
    """Have everything out; raises OutputError where that fails."""
    if sys.stdout is not None:
        write_out("")


def complain(text: str) -> None:
    """A line on standard error, if anybody hears it."""
    with contextlib.suppress(OSError, AttributeError):  # it may be full, or closed
        print(printable(text), file=sys.stderr, flush=True)


def silence(stream: Any) -> None:
    """Let a stream that failed lead nowhere, so that Python does not fail on it again when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_closed_streams() -> None:
    """Give descriptors 0 to 2 to the null device where they are closed, before the first file that is opened gets one.

    Else what a library prints would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
