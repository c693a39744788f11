"""Bundle: files that are kept together, as a folder or as a zip archive, with the SHA-256 of each.

An archive has fixed times, so that the same files give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cpd_onnx.errors import ModelError
from cpd_onnx.io.files import StoredFile, atomic_stream, commit_together

SUMS = "SHA256SUMS"
"""File with the SHA-256 of all others, in the format of `sha256sum -c`."""
ZIP = ".zip"
_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip archive can hold."""
_MODE = 0o100644 << 16
"""Type and permissions of a file in an archive: regular, readable by all."""


@dataclass(frozen=True)
class Stored:
    """A file of a bundle that is copied; `sha256` is what it must have."""

    path: Path
    sha256: str


Entries = Mapping[str, "Stored | bytes"]
"""Files by their path in the bundle, with "/": copies, or new content."""
_Opener = Callable[[str], "contextlib.AbstractContextManager[IO[bytes]]"]


def write(output: Path, entries: Entries) -> list[dict[str, object]]:
    """Write a bundle and return name, size and SHA-256 of each file.

    A path that ends in .zip gives an archive, any other a folder, which must exist. Raises ModelError if a file to be
    copied does not have its SHA-256 (any more); nothing is written then.
    """
    if output.suffix.lower() != ZIP:
        with commit_together():
            return _written(entries, lambda name: atomic_stream(output / name))
    with atomic_stream(output) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        return _written(entries, lambda name: archive.open(_info(name), "w", force_zip64=True))


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _TIME)
    info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_DEFLATED, 3, _MODE
    return info


def _written(entries: Entries, opened: _Opener) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name in sorted(entries):
        entry = entries[name]
        digest, size = hashlib.sha256(), 0
        with opened(name) as stream:
            for piece in [entry] if isinstance(entry, bytes) else StoredFile(entry.path).chunks():
                digest.update(piece)
                size += stream.write(piece)
        found = digest.hexdigest()
        if isinstance(entry, Stored) and found != entry.sha256:
            raise ModelError(f"{entry.path} has changed: its SHA-256 must be {entry.sha256}")
        rows.append({"file": name, "bytes": size, "sha256": found})
    with opened(SUMS) as stream:
        stream.write("".join(_line(str(row["file"]), str(row["sha256"])) for row in rows).encode())
    return rows


def _line(name: str, sha256: str) -> str:
    """Return a line of SUMS; a name with a line break or backslash is escaped as `sha256sum` does."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{chr(92) * (escaped != name)}{sha256}  {escaped}\n"


@contextlib.contextmanager
def folders(*paths: Path) -> Iterator[None]:
    """Create folders that do not exist; after the block remove those of them that are still empty."""
    made = []
    for path in paths:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
    try:
        yield
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
