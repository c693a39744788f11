"""Rows of CSV files that people or other devices wrote."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpd_onnx.errors import DataError
from cpd_onnx.io.files import read_text, translate_read_errors


@dataclass(frozen=True)
class Row:
    """A row of a CSV file.

    Attributes:
        where: File and line, for messages.
        cells: Texts by the name of their column, without white space around them; missing cells are empty.
    """

    where: str
    cells: dict[str, str]

    def number(self, column: str) -> float:
        """Return the finite number of at least 0 in a column; raises DataError for anything else."""
        text = self.cells[column]
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise DataError(f"{self.where}: {column} is {text!r}, which is not a number of at least 0")
        return value

    def count(self, column: str) -> int:
        """Return the whole number of at least 1 in a column; raises DataError for anything else."""
        text = self.cells[column]
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
            raise DataError(f"{self.where}: {column} is {text!r}, which is not a whole number of at least 1")
        return int(text)


def read_rows(path: Path, required: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Return the names of the columns of a CSV file and its rows, without empty rows and repetitions of the header.

    Raises DataError if it cannot be read, lacks a required column or has no rows.
    """
    with translate_read_errors(path, "times", f"{path} is not a CSV file", DataError):
        text = read_text(path)
    try:
        lines = list(_lines(text.removeprefix("\ufeff")))
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file: {error}") from error
    columns = lines[0][1] if lines else []
    missing = [name for name in required if name not in columns]
    if missing:
        raise DataError(f"{path} has no column {', '.join(map(repr, missing))}: its first line must name the columns")
    if len(set(columns)) != len(columns):
        raise DataError(f"{path} names a column twice in its first line")
    rows = []
    for line, cells in lines[1:]:
        if len(cells) > len(columns):
            raise DataError(f"{path}, line {line} has more cells than the first line names columns")
        if cells != columns:
            rows.append(
                Row(f"{path}, line {line}", dict.fromkeys(columns, "") | dict(zip(columns, cells, strict=False)))
            )
    if not rows:
        raise DataError(f"{path} has no rows")
    return columns, rows


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not empty; semicolons separate where no comma does."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    table = csv.reader(text.splitlines(), delimiter=";" if ";" in first and "," not in first else ",")
    for cells in table:
        if any(cell.strip() for cell in cells):
            yield table.line_num, [cell.strip() for cell in cells]
