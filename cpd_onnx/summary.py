"""What a result says of itself in a few rows; `report` prints them, a notebook shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Summary:
    """A small table of text.

    Attributes:
        rows: Cells, row by row.
        columns: Headings; empty if the first cell of each row names the second.
        title: Title of the table; may be empty.
    """

    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()
    title: str = ""

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Summary:
        """Return a summary of names and values.

        >>> Summary.of({"MACs": "1.2 G"}).rows
        (('MACs', '1.2 G'),)
        """
        return cls(tuple(values.items()))

    def html(self) -> str:
        """Return an HTML table with all text escaped, the first column left-aligned and the others right-aligned.

        >>> Summary.of({"a<b": "1"}).html()
        '<table><tr><td style="text-align: left">a&lt;b</td><td style="text-align: right">1</td></tr></table>'
        """
        count = len(self.rows[0]) if self.rows else len(self.columns)
        styles = [f' style="text-align: {"right" if place else "left"}"' for place in range(count)]
        drawn = [_row("th", self.columns, styles)] if self.columns else []
        drawn += [_row("td", row, styles) for row in self.rows]
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}{''.join(drawn)}</table>"


class Summarised:
    """Base of results whose repr is one line, however large they are, and which a notebook shows as a table."""

    def summary(self) -> Summary:
        """Return the most important names and values."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return the summary as one line."""
        return f"{type(self).__name__}({', '.join(f'{name}: {value}' for name, value in self.summary().rows)})"

    def _repr_html_(self) -> str:
        """Return the summary as HTML, for notebooks."""
        return self.summary().html()


def _row(kind: str, cells: Iterable[str], styles: Sequence[str]) -> str:
    found = (f"<{kind}{style}>{escape(cell)}</{kind}>" for cell, style in zip(cells, styles, strict=True))
    return f"<tr>{''.join(found)}</tr>"


def count(number: float) -> str:
    """Return a large number with a unit prefix.

    >>> count(125485696), count(12)
    ('125.5 M', '12')
    """
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f}"


def share(part: float, whole: float) -> str:
    """Return a ratio in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "–"  # noqa: RUF001  # a dash is meant
