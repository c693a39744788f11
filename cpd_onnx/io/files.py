"""Files: read in pieces or mapped, and written so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import signal
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cpd_onnx.errors import ModelError

_CHUNK = 1 << 20
_HELD: ContextVar[frozenset[Path]] = ContextVar("folders", default=frozenset())
"""Folders that are locked here."""


_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip  # a table
_DEEPEST = 100
"""Levels of nesting in a JSON file; what is written here has six. Python gives up at about a thousand."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading a regular file.

    Raises OSError for anything else: a pipe would block until somebody writes, and a device may never end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    kind = _kind(os.fstat(handle).st_mode)
    if kind is None:
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))


def _kind(mode: int) -> str | None:
    """What a path leads to, in words; None for a regular file."""
    return next((words for is_kind, words in _KINDS if is_kind(mode)), None)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file; raises OSError or UnicodeDecodeError where it cannot be read."""
    with os.fdopen(open_regular(path), encoding="utf-8") as stream:
        return stream.read()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file; raises OSError, or ValueError where it is not JSON or nested without sense."""
    try:
        content = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [content]
    for _ in range(_DEEPEST):
        inner = (entry.values() if isinstance(entry, dict) else entry for entry in level)
        level = [entry for entries in inner for entry in entries if isinstance(entry, dict | list)]
        if not level or not isinstance(content, dict | list):
            return content
    raise ValueError("it is nested too deep")


class Stored:
    """A file that is read; it stays what it was when another takes its place."""

    def __init__(self, path: Path) -> None:
        """Open it; raises ModelError if it cannot be read, or is no regular file."""
        try:
            handle = open_regular(path)
            weakref.finalize(self, os.close, handle)  # open as long as somebody may read
            self._stream = os.fdopen(handle, "rb", closefd=False)
            self._kept: bytes | None = None
            self.size = os.fstat(self._stream.fileno()).st_size
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
    """Raise ModelError where writing to `path` would lose a file, has no folder to go to, or cannot succeed."""
    try:
        os.fsencode(path).decode()
        is_there, kind = os.path.lexists(path), _kind_at(path)
    except UnicodeDecodeError as error:
        raise ModelError(f"cannot write {path}: the name is not UTF-8, choose another") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if kind is not None:
        raise ModelError(f"{path} is {kind}: name a file")
    if is_there and not overwrite:
        raise ModelError(f"{path} exists: choose another name or allow overwriting with --force")
    if not path.parent.is_dir():
        raise ModelError(f"folder {path.parent} does not exist: create it first")


def _kind_at(path: Path) -> str | None:
    """What is there, in words, if it is no regular file; also at the end of links."""
    try:
        return _kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_same(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file, through links or in another spelling; a file need not be there yet."""
    try:
        if os.path.samefile(path, other):
            return True
    except (OSError, ValueError):
        pass
    try:
        return path.resolve() == other.resolve()
    except (OSError, ValueError, RuntimeError):  # of links in a circle
        return False


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


class _Part:
    """A file that is being written: complete, it takes the place of another."""

    def __init__(self, folder: Path) -> None:
        self.name: Path | None = None
        self.target: Path | None = None
        self.old: Path | None = None
        handle = _nameless(folder)
        if handle is None:
            handle, name = tempfile.mkstemp(prefix=".cpd-onnx.", suffix=".part", dir=folder)
            self.name = Path(name)
        self.handle = handle

    @property
    def path(self) -> Path:
        """Where its content can be read."""
        return self.name or Path(f"/proc/self/fd/{self.handle}")

    def give_name(self) -> None:
        """Have it in the folder under a name of its own."""
        assert self.target is not None
        if self.name is None:
            name = _spare(self.target.parent)
            # A path from the root goes by no folder, but Python follows links only with one.
            os.link(f"/proc/self/fd/{self.handle}", name, src_dir_fd=self.handle, follow_symlinks=True)
            self.name = name

    def keep_old(self) -> None:
        """Have another name for the file that will be replaced, if there is one."""
        assert self.target is not None
        with contextlib.suppress(OSError):  # there is none, or the file system has no links
            spare = _spare(self.target.parent)
            os.link(self.target, spare, follow_symlinks=False)
            self.old = spare

    def take_place(self) -> None:
        """Take the place of the file that was there."""
        assert self.name is not None
        assert self.target is not None
        self.name.replace(self.target)
        self.name = None

    def give_back(self) -> None:
        """Undo `take_place` as far as that can be done."""
        assert self.target is not None
        with contextlib.suppress(OSError):
            if self.old is not None:
                self.old.replace(self.target)
            elif self.name is None:
                self.target.unlink()

    def discard(self) -> None:
        """Let go of it; nothing is left if it has not taken its place."""
        os.close(self.handle)
        self.forget_old()
        if self.name is not None:
            self.name.unlink(missing_ok=True)

    def forget_old(self) -> None:
        """Let go of the file that was replaced."""
        if self.old is not None:
            self.old.unlink(missing_ok=True)
            self.old = None


def _spare(folder: Path) -> Path:
    """A name that nothing else has."""
    return folder / f".cpd-onnx.{secrets.token_hex(6)}.part"


def _take_permissions(part: _Part, target: Path) -> None:
    """Give a file the permissions of what it replaces, or those that new files have."""
    handle = part.handle if os.chmod in os.supports_fd else part.path
    try:
        old = os.lstat(target)
    except OSError:
        old = None
    if old is not None and stat.S_ISREG(old.st_mode):
        with contextlib.suppress(OSError, AttributeError):  # only root may give files away
            os.chown(handle, old.st_uid, old.st_gid)
        os.chmod(handle, stat.S_IMODE(old.st_mode))
        return
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(handle, 0o666 & ~umask)


class _Batch:
    """Files that wait to appear together, and what is done once they have."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.afterwards: list[Callable[[], object]] = []

    def commit(self) -> None:
        """Have all of them appear; first each gets what may still fail, room for a name."""
        with _undisturbed():
            self._place()
        for action in self.afterwards:
            action()

    def _place(self) -> None:
        for part in self.parts:
            with _naming(part):
                part.give_name()
        for part in self.parts[:-1]:  # where the last one fails, it has replaced nothing
            part.keep_old()
        for place, part in enumerate(self.parts):
            try:
                with _naming(part):
                    part.take_place()
            except ModelError:
                for earlier in self.parts[:place]:
                    earlier.give_back()
                raise
        for part in self.parts:
            part.forget_old()
        for folder in {part.target.parent for part in self.parts if part.target is not None}:
            _sync(folder)

    def discard(self) -> None:
        """Let go of all that has not appeared."""
        for part in self.parts:
            part.discard()


_BATCH: ContextVar[_Batch | None] = ContextVar("batch", default=None)
"""The files that are written together here, if any are."""


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off SIGINT, SIGTERM and SIGHUP until all files have their names."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python has not set, and cannot set again
                signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


@contextlib.contextmanager
def _naming(part: _Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot write {part.target}: {error.strerror}") from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All files that are written inside appear at the end, in the order of their writing; none where something fails.

    Until then `content_of` says where one can be read. Inside another `together` it is the outer one that counts.
    """
    if _BATCH.get() is not None:
        yield
        return
    batch = _Batch()
    token = _BATCH.set(batch)
    try:
        yield
        batch.commit()
    finally:
        _BATCH.reset(token)
        batch.discard()


def content_of(path: Path) -> Path:
    """Where the content of a file can be read: under its name, or where it waits inside `together`."""
    batch = _BATCH.get()
    waiting = batch.parts if batch is not None else []
    return next((part.path for part in reversed(waiting) if part.target == path), path)


def waiting() -> list[Path] | None:
    """The files that wait to appear inside `together`; None outside of it."""
    batch = _BATCH.get()
    return None if batch is None else [part.target for part in batch.parts if part.target is not None]


def afterwards(action: Callable[[], object]) -> None:
    """Do something once what is written here has appeared; right now outside of `together`."""
    batch = _BATCH.get()
    if batch is None:
        action()
    else:
        batch.afterwards.append(action)


@contextlib.contextmanager
def replacing(path: Path | Callable[[], Path]) -> Iterator[IO[bytes]]:
    """A stream to a temporary file that takes the place of `path` when all went well, with its permissions.

    A function may say at the end what the name is, in a folder that it knows from the start. Where the system can do
    it, the temporary file has no name until it is whole, so that nothing is left of it if the process is killed.
    """
    named = path if callable(path) else lambda: path
    try:
        part = _Part(named().parent)
    except OSError as error:
        raise ModelError(f"cannot write to folder {named().parent}: {error.strerror}") from error
    batch, waits = _BATCH.get(), False
    try:
        with os.fdopen(part.handle, "wb", closefd=False) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.target = named()
        _take_permissions(part, part.target)
        if batch is None:
            with _undisturbed():
                part.give_name()
                part.take_place()
            _sync(part.target.parent)
        else:
            batch.parts.append(part)
            waits = True
    except OSError as error:
        raise ModelError(f"cannot write {named()}: {error.strerror}") from error
    finally:
        if not waits:
            part.discard()


def _nameless(folder: Path) -> int | None:
    """A file of a folder that has no name, where the system has such files."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
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
