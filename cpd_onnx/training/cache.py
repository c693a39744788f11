"""The teacher's answers on disk, found by the bytes of the question."""

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

_TABLE = "CREATE TABLE answers (question BLOB PRIMARY KEY, answer BLOB)"
_PATIENCE = 60.0
"""Seconds to wait for another process that writes."""


class AnswerCache:
    """A function of tensors that asks another one only what it does not know yet.

    Where all inputs and outputs have one row per sample, answers are kept by sample, whatever the batches; otherwise by
    batch. Several processes may share the file. Source of the rows: SHA-256 of the question, and of the teacher.
    """

    def __init__(self, path: Path, run: Run, identity: bytes) -> None:
        """Open the file, or make it; `identity` tells the function from others that keep answers there.

        Raises:
            CpdError: the file is no cache, or cannot be written.
        """
        self.path, self.run, self.identity = path, run, identity
        if path.exists() and not path.is_file():
            raise CpdError(f"{path} is not a file: name another for the answers")
        with self._named():
            self.table = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
            self.table.execute("PRAGMA synchronous = OFF")
            self.table.execute("PRAGMA trusted_schema = OFF")
            others = self.table.execute("SELECT name FROM sqlite_schema WHERE type != 'index' AND sql != ?", [_TABLE])
            if (other := others.fetchone()) is not None:
                raise CpdError(f"{path} is a database of something else (it has {other[0]!r}): name another file")
            self.table.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The answers, on the device of the inputs.

        Raises:
            CpdError: the file cannot be read or written.
        """
        rows = _rows(inputs)
        known = self._find(rows) or self._find([inputs])
        if known is not None:
            return self._joined(known, inputs[0].device)
        answers = self.run(inputs)
        if len(rows) > 1 and all(a.ndim and len(a) == len(rows) for a in answers):
            self._keep(zip(rows, _rows(answers), strict=True))
        else:
            self._keep([(inputs, answers)])
        return answers

    def _find(self, questions: Sequence[Sequence[Tensor]]) -> list[list[Tensor]] | None:
        """The answers to all of them, or None."""
        found = []
        for question in questions:
            with self._named():
                row = self.table.execute("SELECT answer FROM answers WHERE question = ?", [self._key(question)])
                answer = row.fetchone()
            if answer is None:
                return None
            found.append(self._unpacked(answer[0]))
        return found

    def _joined(self, known: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
        """The answers to one batch, from those to its parts."""
        try:
            columns = zip(*known, strict=True)
            return [(parts[0] if len(parts) == 1 else torch.cat(parts)).to(device) for parts in columns]
        except (RuntimeError, ValueError, TypeError) as error:
            raise CpdError(f"{self.path} holds answers that do not go together: delete it, or name another") from error

    def _unpacked(self, answer: Any) -> list[Tensor]:
        """The tensors of an answer; no code in it runs."""
        try:
            tensors = torch.load(io.BytesIO(answer), weights_only=True)
        except Exception as error:  # whatever unpickling damaged bytes raises
            raise CpdError(f"{self.path} holds an answer that cannot be read: delete it, or name another") from error
        if not isinstance(tensors, list) or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise CpdError(f"{self.path} holds something else than answers: delete it, or name another")
        return tensors

    def _keep(self, pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """Write all of them at once."""
        made = [(self._key(question), _packed(answer)) for question, answer in pairs]
        with self._named():
            self.table.execute("BEGIN IMMEDIATE")
            self.table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", made)
            self.table.execute("COMMIT")

    def _key(self, question: Sequence[Tensor]) -> bytes:
        digest = hashlib.sha256(self.identity)
        for tensor in question:
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(to_numpy(tensor).tobytes())
        return digest.digest()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the file as ones that name it."""
        try:
            yield
        except sqlite3.Error as error:
            raise CpdError(
                f"{self.path} does not serve as a cache of answers ({error}); delete it, or name another"
            ) from error


def _rows(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """One question per sample, if the tensors have one row for each; else the one question."""
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or sizes == {0}:
        return [tensors]
    return [[tensor[i : i + 1] for tensor in tensors] for i in range(sizes.pop())]


def _packed(answer: Sequence[Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save([tensor.cpu().clone() for tensor in answer], stream)
    return stream.getvalue()
