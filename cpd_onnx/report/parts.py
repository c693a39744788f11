"""What a report is made of, independent of whether it is rendered as HTML, Markdown or PDF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from cpd_onnx.report.figures import Drawing

Part: TypeAlias = "Sentence | Listing | Sheet | Picture | Code"
"""One element of a section."""
_LETTERS = 26
"""Number of letters above which a word in a table may be broken (heuristic)."""
GOOD, BAD, DOUBT = "good", "bad", "unknown"
"""Tones of answers and cards; a neutral one has the tone ""."""
MARKS = {GOOD: "✓", BAD: "✗", DOUBT: "?"}
"""Symbol of each tone, so that colour is never the only sign."""


@dataclass(frozen=True)
class Sentence:
    """One or more sentences; `tone` is "" or "warning". One that is not wide stands beside a table."""

    form: ClassVar[str] = "sentence"
    text: str
    tone: str = ""
    is_wide: bool = True


@dataclass(frozen=True)
class Listing:
    """A bulleted list."""

    form: ClassVar[str] = "listing"
    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: Heading; may be empty.
        columns: Headings of the columns.
        rows: Cells, row by row.
        words: Indices of the columns that hold words instead of numbers.
        is_folded: Whether it is collapsed until the reader opens it.
        is_wide: Whether it takes the full width of the page.
        marked: Indices of the rows that are highlighted.

    """

    form: ClassVar[str] = "sheet"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    is_folded: bool = False
    is_wide: bool = True
    marked: tuple[int, ...] = ()

    def letters(self, column: int) -> int:
        """Return the width in letters at which a column of words breaks neither words nor short names."""
        cells = [row[column] for row in self.rows]
        words = [word for cell in cells for word in ([cell] if len(cell) <= _LETTERS else cell.split())]
        return min(_LETTERS, max(map(len, words), default=0))

    @property
    def is_dense(self) -> bool:
        """Whether it has too many columns for a phone, which shows each of its rows as a card."""
        return len(self.columns) > 3


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        key: Identifier within the page.
        title: Caption.
        label: Description for screen readers.
        drawing: The figure.
        on_phones: The same figure for phones.
        is_wide: Whether it takes the full width of the page.

    """

    form: ClassVar[str] = "picture"
    key: str
    title: str
    label: str
    drawing: Drawing
    on_phones: Drawing
    is_wide: bool = True


@dataclass(frozen=True)
class Code:
    """Text to be copied verbatim."""

    form: ClassVar[str] = "code"
    text: str
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page: identifier, heading and content."""

    key: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Card:
    """A cost at the top of the page.

    Attributes:
        label: Name of the cost.
        value: What is left of it, in large letters.
        detail: Explanation below it, in small letters.
        left: Fraction of the original's cost that remains.

    """

    label: str
    value: str
    detail: str
    left: float


@dataclass(frozen=True)
class Answer:
    """One question of the verdict, answered.

    Attributes:
        question: The question, such as "Faster?".
        tone: `GOOD` for yes, `BAD` for no, `DOUBT` for unknown.
        word: The answer in words.
        value: Key figure, in large letters; may be empty.
        text: Explanation.
        is_plain: Whether a yes is shown without the colour of success, as it says little by itself.

    """

    question: str
    tone: str
    word: str
    value: str
    text: str
    is_plain: bool = False

    @property
    def mark(self) -> str:
        """The symbol of the answer."""
        return MARKS[self.tone]


@dataclass(frozen=True)
class Judgement:
    """The verdict of a run.

    Attributes:
        tone: `GOOD`, `BAD` or `DOUBT`.
        headline: The verdict in one line.
        answers: The answers, in the order of the questions.
        asked: Table of what was asked for against what was reached; None if nothing was asked for.

    """

    tone: str
    headline: str
    answers: tuple[Answer, ...]
    asked: Sheet | None = None

    @property
    def mark(self) -> str:
        """The symbol of the verdict."""
        return MARKS[self.tone]


@dataclass(frozen=True)
class Page:
    """The whole report.

    Attributes:
        title: Heading.
        files: Names of the source and the output file.
        lead: Summary in a few sentences.
        verdict: The verdict; None if the report is on several models, none of which was chosen.
        cards: Costs.
        notes: Notes of the run.
        advice: Suggestions for what to try next.
        sections: The sections.
        tool: Name and version of the program that wrote the report.
        date: When the run ended; empty if unknown.
    """

    title: str
    files: str
    lead: str
    verdict: Judgement | None
    cards: tuple[Card, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    sections: tuple[Section, ...]
    tool: str
    date: str = ""
