"""Files: read in pieces or mapped, and written so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from cpd_onnx.errors import ModelError

_CHUNK = 1 << 20
_HELD: ContextVar[frozenset[Path]] = ContextVar("folders", default=frozenset())
"""Folders that are locked here."""


class Stored:
    """A file that is read; it stays what it was when another takes its place."""

    def __init__(self, path: Path) -> None:
        """Open it; raises ModelError if it cannot be read."""
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, handle)  # open as long as somebody may read
            self._stream = os.fdopen(handle, "rb", closefd=False)
            self._kept = None if path.is_file() else self._stream.read()  # of a pipe
            self.size = os.fstat(self._stream.fileno()).st_size if self._kept is None else len(self._kept)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}; give the path of an .onnx file") from error
        self._path, self._lock = path, threading.Lock()

    @cached_property
    def content(self) -> memoryview:
        """All of it, mapped into memory where that can be done."""
        if self._kept is None:
            try:
                return memoryview(mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError):  # of an empty file, or on a file system without mapping
                self._kept = self.read(0, self.size).tobytes()
        return memoryview(self._kept)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint8]:
        """Some bytes, in memory of their own; raises ModelError if they are not there any more."""
        if self._kept is not None:
            return np.frombuffer(self._kept, np.uint8, length, start).copy()
        made = np.empty(length, np.uint8)
        with self._lock:
            self._stream.seek(start)
            if self._stream.readinto(made.data) != length:
                raise ModelError(f"{self._path} has become shorter while it was read: wait until it is written")
        return made

    def chunks(self) -> Iterator[memoryview]:
        """All of it, piece by piece."""
        for start in range(0, self.size, _CHUNK):
            yield self.read(start, min(_CHUNK, self.size - start)).data


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise ModelError where writing to `path` would lose a file or has no folder to go to."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise ModelError(f"{path} exists: choose another name or allow overwriting with --force")
    if not path.parent.is_dir():
        raise ModelError(f"folder {path.parent} does not exist: create it first")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among those that ask for the same folder, where the system has locks; may be asked for again inside."""
    held, place = _HELD.get(), folder.resolve()
    handle = _lock(folder) if place not in held else None
    token = _HELD.set(held | {place})
    try:
        yield
    finally:
        _HELD.reset(token)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """What holds the lock until it is closed; None where there are no locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


@contextlib.contextmanager
def replacing(path: Path | Callable[[], Path]) -> Iterator[IO[bytes]]:
    """A stream to a temporary file that takes the place of `path` when all went well.

    A function may say at the end what the name is, in a folder that it knows from the start. Where the system can do
    it, the temporary file has no name until it is whole, so that nothing is left of it if the process is killed.
    """
    named = path if callable(path) else lambda: path
    temporary: Path | None = None
    try:
        handle = _nameless(named().parent)
        if handle is None:
            handle, name = tempfile.mkstemp(prefix=".cpd-onnx.", suffix=".part", dir=named().parent)
            temporary = Path(name)
    except OSError as error:
        raise ModelError(f"cannot write to folder {named().parent}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if temporary is None:
                temporary = named().parent / f".cpd-onnx.{os.getpid()}-{threading.get_ident()}.part"
                here = stream.fileno()  # a path from the root goes by no folder, but Python follows links only with one
                os.link(f"/proc/self/fd/{here}", temporary, src_dir_fd=here, follow_symlinks=True)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(named())
        _sync(named().parent)
    except OSError as error:
        raise ModelError(f"cannot write {named()}: {error.strerror}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _nameless(folder: Path) -> int | None:
    """A file of a folder that has no name, where the system has such files."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError:
        return None


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
