"""A cache of the teacher's outputs on disk, keyed by the bytes of its inputs."""

from __future__ import annotations

import hashlib
import io
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpd_onnx.errors import CpdError
from cpd_onnx.torch.dtypes import to_numpy

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Function from the inputs of a model to its outputs."""

_TABLE = "CREATE TABLE answers (question BLOB PRIMARY KEY, answer BLOB)"
_TIMEOUT = 60.0
"""Maximum time in seconds to wait for a lock held by another process (heuristic)."""


class AnswerCache:
    """A function of tensors that caches the results of another one in a file.

    If all inputs and outputs have one row per sample, outputs are stored by sample, independent of the batches;
    otherwise by batch. Several processes may share the file. The key of a row is the SHA-256 of teacher and inputs.
    """

    def __init__(self, path: Path, run: Run, identity: bytes) -> None:
        """Open or create the file; `identity` distinguishes the function from others whose outputs it holds.

        Raises:
            CpdError: The file is not a cache, or cannot be written.
        """
        self.path, self.run, self.identity = path, run, identity
        if path.exists() and not path.is_file():
            raise CpdError(f"{path} is not a file: name another for the teacher's outputs")
        with self._translate_errors():
            self.table = sqlite3.connect(path, timeout=_TIMEOUT, isolation_level=None)
            self.table.execute("PRAGMA synchronous = OFF")
            self.table.execute("PRAGMA trusted_schema = OFF")
            others = self.table.execute("SELECT name FROM sqlite_schema WHERE type != 'index' AND sql != ?", [_TABLE])
            if (other := others.fetchone()) is not None:
                raise CpdError(f"{path} is a database of another kind (it has {other[0]!r}): name another file")
            self.table.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the outputs for a batch of inputs, on their device.

        Raises:
            CpdError: The file cannot be read or written.
        """
        rows = _rows(inputs)
        known = self._find(rows) or self._find([inputs])
        if known is not None:
            return self._joined(known, inputs[0].device)
        answers = self.run(inputs)
        if len(rows) > 1 and all(a.ndim and len(a) == len(rows) for a in answers):
            self._store(zip(rows, _rows(answers), strict=True))
        else:
            self._store([(inputs, answers)])
        return answers

    def _find(self, questions: Sequence[Sequence[Tensor]]) -> list[list[Tensor]] | None:
        """Return the stored outputs for all of the given inputs; None if one is missing."""
        found = []
        for question in questions:
            with self._translate_errors():
                row = self.table.execute("SELECT answer FROM answers WHERE question = ?", [self._key(question)])
                answer = row.fetchone()
            if answer is None:
                return None
            found.append(self._unpacked(answer[0]))
        return found

    def _joined(self, known: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
        """Return the outputs for one batch, concatenated from those for its samples."""
        try:
            columns = zip(*known, strict=True)
            return [(parts[0] if len(parts) == 1 else torch.cat(parts)).to(device) for parts in columns]
        except (RuntimeError, ValueError, TypeError) as error:
            raise CpdError(f"{self.path} holds inconsistent outputs: delete it, or name another") from error

    def _unpacked(self, answer: Any) -> list[Tensor]:
        """Return the tensors of a stored value; unpickling cannot run code from it."""
        try:
            tensors = torch.load(io.BytesIO(answer), weights_only=True)
        except Exception as error:  # whatever unpickling damaged bytes raises
            raise CpdError(f"{self.path} holds outputs that cannot be read: delete it, or name another") from error
        if not isinstance(tensors, list) or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise CpdError(f"{self.path} holds values that are not outputs: delete it, or name another")
        return tensors

    def _store(self, pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """Store pairs of inputs and outputs in one transaction."""
        rows = [(self._key(question), _packed(answer)) for question, answer in pairs]
        with self._translate_errors():
            self.table.execute("BEGIN IMMEDIATE")
            self.table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            self.table.execute("COMMIT")

    def _key(self, question: Sequence[Tensor]) -> bytes:
        digest = hashlib.sha256(self.identity)
        for tensor in question:
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(to_numpy(tensor).tobytes())
        return digest.digest()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn errors of SQLite into CpdError with the name of the file."""
        try:
            yield
        except sqlite3.Error as error:
            raise CpdError(
                f"{self.path} cannot be used as a cache of outputs ({error}); delete it, or name another"
            ) from error


def _rows(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the tensors split by sample if they have one row for each; otherwise the whole batch."""
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or sizes == {0}:
        return [tensors]
    return [[tensor[i : i + 1] for tensor in tensors] for i in range(sizes.pop())]


def _packed(answer: Sequence[Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save([tensor.cpu().clone() for tensor in answer], stream)
    return stream.getvalue()
