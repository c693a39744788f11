"""Files that are read in chunks or memory-mapped, and written atomically: complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
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

from cpd_onnx.errors import CpdError, ModelError

_CHUNK = 1 << 20
"""Size in bytes of the chunks in which a file is hashed (heuristic)."""
_LOCKED: ContextVar[frozenset[Path]] = ContextVar("folders", default=frozenset())
"""Folders that the current context has locked."""
_PART = re.compile(r"\.cpd-onnx\.\w+\.part")
"""Names of temporary files."""
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip  # a table
"""Predicates on `st_mode` and the name of the kind of file that each recognizes."""
_MAX_DEPTH = 100
"""Maximum nesting depth of a JSON file (heuristic): files of this package have six levels, and Python's parser gives up
at about a thousand."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises OSError for anything else: a pipe would block until it has a writer, and a device may never end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    kind = _kind(os.fstat(handle).st_mode)
    if kind is None:
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, f"it is {kind}, not a file", os.fspath(path))


def _kind(mode: int) -> str | None:
    """Return the kind of file with that mode, such as "a folder"; None for a regular file."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a regular file; raises OSError or UnicodeDecodeError if it cannot be read."""
    with os.fdopen(open_regular(path), encoding="utf-8") as stream:
        return stream.read()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file.

    Raises OSError if it cannot be read, and ValueError if it is not JSON or nested deeper than `_MAX_DEPTH`.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [content]
    for _ in range(_MAX_DEPTH):
        inner = (entry.values() if isinstance(entry, dict) else entry for entry in level)
        level = [entry for entries in inner for entry in entries if isinstance(entry, dict | list)]
        if not level or not isinstance(content, dict | list):
            return content
    raise ValueError("it is nested too deeply")


@contextlib.contextmanager
def translate_read_errors(
    path: str | os.PathLike[str], kind: str, invalid: str, error: type[CpdError]
) -> Iterator[None]:
    """Raise `error` for a file that cannot be read, such as "cannot read recipe r.toml", or has no valid content.

    Args:
        path: The file.
        kind: What it is to be, such as "recipe".
        invalid: What is wrong if its content is not valid, such as "r.toml is not a TOML file"; the reason follows it.
        error: Type of the error.
    """
    try:
        yield
    except OSError as problem:
        raise error(f"cannot read {kind} {os.fspath(path)}: {problem.strerror}") from problem
    except RecursionError as problem:
        raise error(f"{invalid}: it is nested too deeply") from problem
    except ValueError as problem:
        raise error(f"{invalid}: {problem}") from problem


class StoredFile:
    """A file opened for reading; its content stays readable after the path is replaced by another file."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises ModelError if it cannot be read or is not a regular file."""
        try:
            handle = open_regular(path)
            weakref.finalize(self, os.close, handle)  # open as long as this object may be read
            self._stream = os.fdopen(handle, "rb", closefd=False)
            self._loaded: bytes | None = None
            self.size = os.fstat(self._stream.fileno()).st_size
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}; give the path of an .onnx file") from error
        self._path, self._lock = path, threading.Lock()

    @cached_property
    def content(self) -> memoryview:
        """The whole content, memory-mapped where the system supports it."""
        if self._loaded is None:
            try:
                return memoryview(mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError):  # an empty file, or a file system that cannot map files
                self._loaded = self.read(0, self.size).tobytes()
        return memoryview(self._loaded)

    def read(self, start: int, length: int) -> npt.NDArray[np.uint8]:
        """Return a copy of a range of bytes; raises ModelError if the file has been truncated since it was opened."""
        if self._loaded is not None:
            return np.frombuffer(self._loaded, np.uint8, length, start).copy()
        buffer = np.empty(length, np.uint8)
        with self._lock:
            self._stream.seek(start)
            if self._stream.readinto(buffer.data) != length:
                raise ModelError(f"{self._path} was truncated while it was read: wait until it is completely written")
        return buffer

    def chunks(self) -> Iterator[memoryview]:
        """Yield the whole content in chunks."""
        for start in range(0, self.size, _CHUNK):
            yield self.read(start, min(_CHUNK, self.size - start)).data


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise ModelError if `path` exists and may not be overwritten, its folder is missing, or it cannot be written."""
    try:
        os.fsencode(path).decode()
        is_there, kind = os.path.lexists(path), _kind_at(path)
    except UnicodeDecodeError as error:
        raise ModelError(f"cannot write {path}: the name is not UTF-8, choose another") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if kind is not None:
        raise ModelError(f"{path} is {kind}: give the path of a file")
    if is_there and not overwrite:
        raise ModelError(f"{path} exists: choose another name or allow overwriting with --force")
    if not path.parent.is_dir():
        raise ModelError(f"folder {path.parent} does not exist: create it first")


def _kind_at(path: Path) -> str | None:
    """Return the kind of file at a path, links followed; None for a regular file or none."""
    try:
        return _kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths denote the same file, also through links; the file need not exist yet."""
    try:
        if os.path.samefile(path, other):
            return True
    except (OSError, ValueError):
        pass
    try:
        return path.resolve() == other.resolve()
    except (OSError, ValueError, RuntimeError):  # circular links
        return False


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with atomic_stream(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, where the system has file locks; reentrant within one context.

    Temporary files in it that a killed process left between the moves of a commit are removed.
    """
    held, place = _LOCKED.get(), folder.resolve()
    handle = _lock(folder) if place not in held else None
    if handle is not None:
        _remove_abandoned(folder)
    token = _LOCKED.set(held | {place})
    try:
        yield
    finally:
        _LOCKED.reset(token)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the descriptor whose closing unlocks it; None where the system has no file locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that no longer run: these hold no locks."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for path in [entry.path for entry in entries if _PART.fullmatch(entry.name)]:
            if _is_abandoned(path):
                os.unlink(path)


def _is_abandoned(path: str) -> bool:
    """Return whether a temporary file is a regular one that no process has locked."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(handle).st_mode) and _hold(handle, is_shared=False)
    finally:
        os.close(handle)


def _hold(handle: int, *, is_shared: bool) -> bool:
    """Lock an open file until it is closed, without waiting; return whether that succeeded."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


class _PendingFile:
    """A temporary file that replaces its target once it is complete.

    It is locked, and so is the backup, as a sign for `_remove_abandoned` that a process needs them.
    """

    def __init__(self, folder: Path) -> None:
        self.name: Path | None = None
        self.target: Path | None = None
        self.backup: Path | None = None
        self.backup_handle: int | None = None
        handle = _open_unnamed(folder)
        if handle is None:
            handle, name = tempfile.mkstemp(prefix=".cpd-onnx.", suffix=".part", dir=folder)
            self.name = Path(name)
        self.handle = handle
        _hold(handle, is_shared=True)

    @property
    def path(self) -> Path:
        """The path under which its content can be read."""
        return self.name or Path(f"/proc/self/fd/{self.handle}")

    def give_name(self) -> None:
        """Link it into the folder of its target under a temporary name."""
        assert self.target is not None
        if self.name is None:
            name = _temporary_name(self.target.parent)
            # `src_dir_fd` is ignored for an absolute path, but Python follows links only if it is given.
            os.link(f"/proc/self/fd/{self.handle}", name, src_dir_fd=self.handle, follow_symlinks=True)
            self.name = name

    def back_up(self) -> None:
        """Link the file that will be replaced to a backup name, if there is one."""
        assert self.target is not None
        with contextlib.suppress(OSError):  # no such file, or one that nobody can read
            self.backup_handle = os.open(self.target, os.O_RDONLY | os.O_NONBLOCK)
            _hold(self.backup_handle, is_shared=True)
        with contextlib.suppress(OSError):  # no such file, or a file system without links
            backup = _temporary_name(self.target.parent)
            os.link(self.target, backup, follow_symlinks=False)
            self.backup = backup

    def replace_target(self) -> None:
        """Rename it to its target."""
        assert self.name is not None
        assert self.target is not None
        self.name.replace(self.target)
        self.name = None

    def restore_target(self) -> None:
        """Undo `replace_target` as far as possible."""
        assert self.target is not None
        with contextlib.suppress(OSError):
            if self.backup is not None:
                self.backup.replace(self.target)
            elif self.name is None:
                self.target.unlink()

    def discard(self) -> None:
        """Close it and remove its temporary names; nothing is left if it has not replaced its target."""
        os.close(self.handle)
        self.remove_backup()
        if self.name is not None:
            self.name.unlink(missing_ok=True)

    def remove_backup(self) -> None:
        """Remove the backup of the file that was replaced."""
        if self.backup is not None:
            self.backup.unlink(missing_ok=True)
            self.backup = None
        if self.backup_handle is not None:
            os.close(self.backup_handle)
            self.backup_handle = None


def _temporary_name(folder: Path) -> Path:
    return folder / f".cpd-onnx.{secrets.token_hex(6)}.part"


def _copy_permissions(part: _PendingFile, target: Path) -> None:
    """Give a file the owner and mode of the file that it replaces, or the mode of new files."""
    handle = part.handle if os.chmod in os.supports_fd else part.path
    try:
        old = os.lstat(target)
    except OSError:
        old = None
    if old is not None and stat.S_ISREG(old.st_mode):
        with contextlib.suppress(OSError, AttributeError):  # only root may change the owner
            os.chown(handle, old.st_uid, old.st_gid)
        os.chmod(handle, stat.S_IMODE(old.st_mode))
        return
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(handle, 0o666 & ~umask)


class _Batch:
    """Files that are committed together, and actions that run after the commit."""

    def __init__(self) -> None:
        self.parts: list[_PendingFile] = []
        self.actions: list[Callable[[], object]] = []

    def commit(self) -> None:
        """Make all files appear; the step that may fail for lack of space, linking a name, comes first for each."""
        with _signals_deferred():
            self._replace_targets()
        for action in self.actions:
            action()

    def _replace_targets(self) -> None:
        for part in self.parts:
            with _translate_write_errors(part):
                part.give_name()
        for part in self.parts[:-1]:  # if the last one fails, it has replaced nothing
            part.back_up()
        for place, part in enumerate(self.parts):
            try:
                with _translate_write_errors(part):
                    part.replace_target()
            except ModelError:
                for earlier in self.parts[:place]:
                    earlier.restore_target()
                raise
        for part in self.parts:
            part.remove_backup()
        for folder in {part.target.parent for part in self.parts if part.target is not None}:
            _sync(folder)

    def discard(self) -> None:
        """Discard all files that have not been committed."""
        for part in self.parts:
            part.discard()


_BATCH: ContextVar[_Batch | None] = ContextVar("batch", default=None)
"""The batch that the current context writes to; None outside of `commit_together`."""


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP until the block is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not installed by Python, which therefore cannot reinstall it
                signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def _translate_write_errors(part: _PendingFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot write {part.target}: {error.strerror}") from error


@contextlib.contextmanager
def commit_together() -> Iterator[None]:
    """Commit all files written inside the block at its end, in the order of writing; none of them if anything fails.

    Until then `content_of` returns the path at which a file can be read. Nested blocks commit with the outermost one.
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
    """Return the path at which the content of a file can be read: its own, or that of the uncommitted file."""
    batch = _BATCH.get()
    parts = batch.parts if batch is not None else []
    return next((part.path for part in reversed(parts) if part.target == path), path)


def pending_files() -> list[Path] | None:
    """Return the files that `commit_together` has yet to commit; None outside of it."""
    batch = _BATCH.get()
    return None if batch is None else [part.target for part in batch.parts if part.target is not None]


def after_commit(action: Callable[[], object]) -> None:
    """Run an action after the commit of `commit_together`, or at once outside of it."""
    batch = _BATCH.get()
    if batch is None:
        action()
    else:
        batch.actions.append(action)


@contextlib.contextmanager
def atomic_stream(path: Path | Callable[[], Path]) -> Iterator[IO[bytes]]:
    """Open a stream to a temporary file that replaces `path` if the block succeeds, and takes over its permissions.

    A function instead of a path returns the final name once the content is written; its folder must not change. Where
    the system supports it, the temporary file is unnamed until it is complete, so that a killed process leaves nothing
    behind.
    """
    named = path if callable(path) else lambda: path
    try:
        part = _PendingFile(named().parent)
    except OSError as error:
        raise ModelError(f"cannot write to folder {named().parent}: {error.strerror}") from error
    batch, is_pending = _BATCH.get(), False
    try:
        with os.fdopen(part.handle, "wb", closefd=False) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.target = named()
        _copy_permissions(part, part.target)
        if batch is None:
            with _signals_deferred():
                part.give_name()
                part.replace_target()
            _sync(part.target.parent)
        else:
            batch.parts.append(part)
            is_pending = True
    except OSError as error:
        raise ModelError(f"cannot write {named()}: {error.strerror}") from error
    finally:
        if not is_pending:
            part.discard()


def _open_unnamed(folder: Path) -> int | None:
    """Open an unnamed file (`O_TMPFILE`) in a folder and return its descriptor; None where that is not supported."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return None


def _sync(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
