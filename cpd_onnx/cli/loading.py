"""Loading the libraries: where that fails, as with too little memory, it is one line and not a page."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

from cpd_onnx.io.streams import print_error

_LENGTH = 300
"""Characters of a reason."""
_LEAST = 390 << 20
"""Bytes of address space that Python and the libraries take on two cores (measured: 384 MiB are too few, 400 do); with
less, the one or the other waits for memory for ever."""
_PATIENCE = 120
"""Seconds that loading may take where the address space is limited, with which libraries may wait for ever."""


class Start:
    """The way from the first process to the command: what fails on it is said once, by whoever still can."""

    COMPLAINT: ClassVar[str] = "error: the libraries cannot be loaded: is there enough memory (ulimit -v)?"

    def __init__(self) -> None:
        """Share a byte with the process that will do the work."""
        self._done = mmap.mmap(-1, 1)

    @property
    def is_done(self) -> bool:
        """Whether the command has begun, or it was said why not."""
        return self._done[0] != 0

    def run(self) -> int:
        """Load the libraries and run the command; its exit code."""
        main = self._loaded()
        self._done[0] = 1
        return 1 if main is None else main()

    def _loaded(self) -> Callable[[], int] | None:
        """The function behind the command line; None where it cannot be loaded, which is said then."""
        limit = address_space()
        if limit is not None and limit < _LEAST:
            print_error(f"error: {limit >> 20} MiB of memory (ulimit -v) are too few: give it {_LEAST >> 20} at least")
            return None
        try:
            with _held_back(), _bounded(limit):
                from cpd_onnx.cli.main import main
        except ModuleNotFoundError as error:
            print_error(f"error: the package {error.name} is not installed: pip install cpd-onnx")
            return None
        except (ImportError, MemoryError, OSError, RuntimeError, SystemError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print_error(f"{self.COMPLAINT} ({reason[:_LENGTH]})")
            return None
        except KeyboardInterrupt:  # OpenBLAS sends the signal itself where it gets no threads
            print_error("stopped" if limit is None else self.COMPLAINT)
            return None
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a text stream, if any
        return main


def address_space() -> int | None:
    """Bytes of address space that this process may have; None where there is no limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit


@contextlib.contextmanager
def _bounded(limit: int | None) -> Iterator[None]:
    """End this process if what is inside takes too long where the address space is limited."""
    if limit is None:
        yield
        return
    signal.alarm(_PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """What goes to standard error meanwhile, by whatever way, comes after all went well.

    Libraries written in C print lines of their own when they get no memory or no threads.
    """
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
