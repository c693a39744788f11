"""The report as PDF with selectable text, written by fpdf2 in the fonts that matplotlib brings along.

It needs no browser and no library of the system. The same page gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cpd_onnx.report.parts import BAD, DOUBT, GOOD, Code, Judgement, Listing, Page, Part, Picture, Sentence, Sheet

if TYPE_CHECKING:
    from fpdf import FPDF

_COLOURS = {GOOD: (11, 122, 75), BAD: (179, 38, 30), DOUBT: (138, 90, 0)}
"""Colours of the tones, those of the page."""
_INK, _MUTED, _LINE, _PANEL = (27, 36, 48), (91, 102, 115), (201, 209, 217), (245, 247, 249)
_MARGIN, _WIDTH = 16.0, 178.0
"""Margin, and width between the margins of a sheet of A4, in mm."""
_LEADING = 1.4
"""Height of a line as a multiple of the size of its letters (heuristic)."""
_POINT = 0.3528
"""Millimetres in a point."""
_LETTERS = (6, 34)
"""Smallest and largest weight of a column, in letters (heuristic)."""
_UNDATED = datetime(2000, 1, 1, tzinfo=UTC)
"""Date of the document where that of the run is unknown."""
_FONTS = {("sans", ""): "DejaVuSans", ("sans", "B"): "DejaVuSans-Bold", ("mono", ""): "DejaVuSansMono"}


def pdf(page: Page, date: datetime | None = None) -> bytes:
    """Return the report as the bytes of a PDF document; `date` is that of the run."""
    document = _document(page.title, date or _UNDATED)
    writer = _Writer(document)
    writer.say("cpd-onnx report", 8, colour=_MUTED)
    writer.say(page.title, 18, style="B")
    writer.say(" · ".join(filter(None, (page.files, page.date))), 8, colour=_MUTED)
    if page.verdict is not None:
        writer.verdict(page.verdict)
    writer.say(page.lead, 9.5)
    if page.cards:
        rows = tuple((card.label, card.value, card.detail) for card in page.cards)
        writer.table(Sheet("", ("", "", ""), rows, words=(0, 2)))
    for note in page.notes:
        writer.say(f"Note: {note}", 8.5)
    for hint in page.advice:
        writer.say(f"Advice: {hint}", 8.5)
    for section in page.sections:
        writer.heading(section.title)
        for part in section.parts:
            writer.part(part)
    writer.say(f"Made by {page.tool}.", 8, colour=_MUTED)
    return bytes(document.output())


def _document(title: str, date: datetime) -> FPDF:
    """Return an empty document in the fonts of matplotlib."""
    import matplotlib
    from fpdf import FPDF

    document = FPDF(format="A4")
    document.set_creation_date(date)
    document.set_title(_plain(title))
    document.set_margins(_MARGIN, _MARGIN)
    document.set_auto_page_break(auto=True, margin=_MARGIN)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for (family, style), name in _FONTS.items():
        document.add_font(family, style, folder / f"{name}.ttf")
    document.add_page()
    return document


def _plain(text: str) -> str:
    """Return the text without unprintable characters, such as lone surrogates, which no file can hold."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


class _Writer:
    """Writes parts one below the other."""

    def __init__(self, document: FPDF) -> None:
        self.document = document

    def say(
        self, text: str, size: float, *, colour: tuple[int, int, int] = _INK, style: str = "", family: str = "sans"
    ) -> None:
        """Write a paragraph; nothing if it is empty."""
        if not text:
            return
        self.document.set_text_color(*colour)
        self.document.set_font(family, style, size)
        height = size * _POINT * _LEADING
        self.document.multi_cell(_WIDTH, height, self.known(text), align="L", new_x="LMARGIN", new_y="NEXT")
        self.document.ln(0.35 * height)

    def known(self, text: str) -> str:
        """Return the text with a replacement for letters that the current font lacks."""
        font = self.document.current_font
        glyphs = getattr(font, "cmap", None)
        plain = _plain(text)
        if glyphs is None:
            return plain
        return "".join(
            letter if letter == "\n" or ord(letter) in glyphs else "\N{REPLACEMENT CHARACTER}" for letter in plain
        )

    def heading(self, text: str) -> None:
        """Write the heading of a section, with room for some lines below it on the same page."""
        if self.document.will_page_break(40):
            self.document.add_page()
        self.document.ln(3)
        self.say(text, 13, style="B")

    def verdict(self, verdict: Judgement) -> None:
        """Write the verdict: its headline, its answers, and what was asked for against what was reached."""
        self.say(f"{verdict.mark} {verdict.headline}", 13, style="B", colour=_COLOURS[verdict.tone])
        rows = tuple((a.question, f"{a.mark} {a.word}", a.value, a.text) for a in verdict.answers)
        colours = [(1, _INK if a.is_plain else _COLOURS[a.tone]) for a in verdict.answers]
        self.table(Sheet("", ("", "", "", ""), rows, words=(0, 1, 2, 3)), colours)
        if verdict.asked is not None:
            self.say("Asked for and reached", 9.5, style="B")
            self.table(verdict.asked)

    def part(self, part: Part) -> None:
        """Write a part of a section."""
        if isinstance(part, Sentence):
            self.say(part.text, 9.5, colour=_COLOURS[DOUBT] if part.tone else _INK)
        elif isinstance(part, Listing):
            self.say("\n".join((f"{part.title}:", *(f"• {item}" for item in part.items))), 9.5)
        elif isinstance(part, Code):
            self.say(part.title, 9.5, style="B")
            self.say(part.text, 8, family="mono")
        elif isinstance(part, Picture):
            self.picture(part)
        else:
            self.say(part.title, 9.5, style="B")
            self.table(part)

    def picture(self, picture: Picture) -> None:
        """Draw a figure, no wider than it is on a screen, and its caption."""
        wide, high = picture.drawing.size
        width = min(_WIDTH, 25.4 * wide * (1.0 if picture.is_wide else 0.9))
        if self.document.will_page_break(width * high / wide + 8):
            self.document.add_page()
        self.document.image(io.BytesIO(picture.drawing.png()), w=width, alt_text=_plain(picture.label))
        self.say(picture.title, 8, colour=_MUTED)

    def table(self, sheet: Sheet, colours: Sequence[tuple[int, tuple[int, int, int]]] = ()) -> None:
        """Write a table, whose heading is repeated on each page; `colours` are column and colour of a cell a row."""
        from fpdf.enums import TableBordersLayout
        from fpdf.fonts import FontFace

        has_heads = any(sheet.columns)
        self.document.set_font("sans", "", 8)
        self.document.set_text_color(*_INK)
        self.document.set_draw_color(*_LINE)
        aligned = tuple("LEFT" if place in sheet.words else "RIGHT" for place in range(len(sheet.columns)))
        with self.document.table(
            borders_layout=TableBordersLayout.HORIZONTAL_LINES, col_widths=tuple(_weights(sheet)), text_align=aligned,
            headings_style=FontFace(emphasis="", color=_MUTED), first_row_as_headings=has_heads, line_height=4,
            padding=(0.8, 1.2), width=_WIDTH, num_heading_rows=int(has_heads),
        ) as table:  # fmt: skip  # what and how
            if has_heads:
                table.row([self.known(name) for name in sheet.columns])
            for place, cells in enumerate(sheet.rows):
                is_bold = place in sheet.marked
                row = table.row()
                for column, cell in enumerate(cells):
                    colour = next((each for at, each in colours[place : place + 1] if at == column), _INK)
                    face = FontFace(emphasis="B" if is_bold or colour != _INK else "", color=colour)
                    row.cell(self.known(cell), style=face)
        self.document.ln(3)


def _weights(sheet: Sheet) -> Iterable[float]:
    """Yield the weight of each column: the length of its longest cell, within bounds."""
    for column, name in enumerate(sheet.columns):
        longest = max((len(row[column]) for row in sheet.rows), default=0)
        yield max(_LETTERS[0], min(_LETTERS[1], max(longest, max(map(len, name.split()), default=0))))
