"""Loading the libraries: where that fails, as with too little memory, it is one line and not a page."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from cpd_onnx.streams import complain

_LENGTH = 300
"""Characters of a reason."""


def load_command() -> Callable[[], int] | None:
    """The function behind the command line; None where it cannot be loaded, which is said on standard error then.

    Libraries written in C print lines of their own when they get no memory or no threads: they are held back, and
    shown only where all goes on.
    """
    try:
        with _held_back():
            from cpd_onnx.cli import main
    except ModuleNotFoundError as error:
        complain(f"error: the package {error.name} is not installed: pip install cpd-onnx")
        return None
    except (ImportError, MemoryError, OSError, RuntimeError, SystemError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        complain(f"error: the libraries cannot be loaded ({reason[:_LENGTH]}): is there enough memory (ulimit -v)?")
        return None
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a text stream, if it is any
    return main


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """What goes to standard error meanwhile, by whatever way, comes after all went well."""
    if not hasattr(os, "memfd_create"):
        yield
        return
    try:
        place, real = os.memfd_create("cpd-onnx"), os.dup(2)
    except OSError:
        yield
        return
    try:
        os.dup2(place, 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
        with contextlib.suppress(OSError):
            os.write(2, os.pread(place, 1 << 16, 0))
    finally:
        os.close(place)
        os.close(real)
