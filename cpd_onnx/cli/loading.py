"""Loads the libraries, so that a failure, such as too little memory, ends with a one-line error."""

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
"""Length of a reason, in characters, above which it is cut off; a heuristic."""
_LEAST = 390 << 20
"""Bytes of address space that Python and the libraries need on two cores (measured: 384 MiB is too little, 400 MiB is
enough); with less, some libraries wait for memory forever."""
_PATIENCE = 120
"""Seconds that loading may take under a limited address space, where libraries may wait forever; a heuristic."""


class Start:
    """The start of a command, across the first process and its child: a failure is reported exactly once."""

    MESSAGE: ClassVar[str] = "error: cannot load the libraries; check the memory limit (ulimit -v)"

    def __init__(self) -> None:
        """Allocate a byte that is shared with the child process."""
        self._done = mmap.mmap(-1, 1)

    @property
    def is_done(self) -> bool:
        """Whether the command has started, or the reason why it could not was printed."""
        return self._done[0] != 0

    def run(self) -> int:
        """Load the libraries and run the command; return its exit code."""
        main = self._loaded()
        self._done[0] = 1
        return 1 if main is None else main()

    def _loaded(self) -> Callable[[], int] | None:
        """Return the main function of the command line; None, after an error message, if it cannot be loaded."""
        limit = address_space()
        if limit is not None and limit < _LEAST:
            print_error(
                f"error: the memory limit (ulimit -v) must be at least {_LEAST >> 20} MiB, got {limit >> 20} MiB"
            )
            return None
        try:
            with _stderr_deferred(), _bounded(limit):
                from cpd_onnx.cli.main import main
        except ModuleNotFoundError as error:
            print_error(f"error: the package {error.name} is not installed: pip install cpd-onnx")
            return None
        except (ImportError, MemoryError, OSError, RuntimeError, SystemError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print_error(f"{self.MESSAGE} ({reason[:_LENGTH]})")
            return None
        except KeyboardInterrupt:  # OpenBLAS sends SIGINT to its own process when it cannot start threads
            print_error("interrupted" if limit is None else self.MESSAGE)
            return None
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a text stream, if any
        return main


def address_space() -> int | None:
    """Return the limit of this process's address space, in bytes; None if there is none."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit


@contextlib.contextmanager
def _bounded(limit: int | None) -> Iterator[None]:
    """End this process if the block takes too long under a limited address space."""
    if limit is None:
        yield
        return
    signal.alarm(_PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _stderr_deferred() -> Iterator[None]:
    """Hold back everything written to standard error in the block, and write it afterwards if the block succeeds.

    Native libraries print messages of their own when they cannot allocate memory or start threads.
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
