"""The standard streams: control characters are escaped, and failed writes become one-line errors."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

from cpd_onnx.errors import OutputError

PIPE_CLOSED = 141
"""Exit code after the reader of standard output closed the pipe: 128 + 13, as of a program terminated by SIGPIPE."""


def printable(text: str) -> str:
    r"""Return the text with control characters, line breaks and undecodable bytes escaped.

    Names of files and names in models are untrusted: an escape sequence in one could recolour, scroll or retitle a
    terminal, and a line break could pass for a message of this program.

    >>> print(printable("a\x1b[2Jb\n"))
    a\x1b[2Jb\n
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a surrogate for a byte of a file name that is not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


def output_error(error: OSError | None) -> OutputError:
    """Return the OutputError for a failed write to standard output; None means that the stream is closed."""
    reason = "it is closed" if error is None else error.strerror or str(error)
    is_pipe = error is not None and error.errno == errno.EPIPE
    return OutputError(f"cannot write to standard output: {reason}", is_pipe=is_pipe)


def write_stdout(text: str) -> None:
    """Write to standard output; raises OutputError if that fails."""
    if sys.stdout is None:
        raise output_error(None)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise output_error(error) from error


def flush_stdout() -> None:
    """Flush standard output; raises OutputError if that fails."""
    if sys.stdout is not None:
        write_stdout("")


def print_error(text: str) -> None:
    """Print a line to standard error; ignored if that is closed or cannot be written to.

    The line is written at once, since another thread may print its progress at the same time.
    """
    with contextlib.suppress(OSError, AttributeError):
        print(f"{printable(text)}\n", end="", file=sys.stderr, flush=True)


def redirect_to_null(stream: Any) -> None:
    """Redirect a stream that failed to the null device, so that flushing it at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_closed_streams() -> None:
    """Open descriptors 0 to 2 on the null device where they are closed.

    Otherwise the next file that is opened would take such a descriptor, and receive what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
