"""The report of a run as one file: HTML with embedded figures, Markdown or PDF, from the same content.

The content is a dictionary of plain values of format "cpd-onnx/report", described by `schema()`; any part may be
absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from importlib import resources, util
from typing import TYPE_CHECKING, Any

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.report.parts import Page, Picture
from cpd_onnx.report.sections import page
from cpd_onnx.report.tables import REPORT_FORMAT, REPORT_VERSION

if TYPE_CHECKING:
    from jinja2 import Environment

_SPECIAL = re.compile(r"([\\`*_\[\]<|~$&])")
"""Characters that Markdown interprets."""
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_START = re.compile(r"^([-+=>#])")
_BACKTICKS = re.compile(r"`+")


def html(content: Mapping[str, Any]) -> str:
    """Return the report as a self-contained HTML page, without scripts or references to other files.

    The same content gives the same text.

    Args:
        content: Content of the report, see `schema`.

    Raises:
        UnsupportedError: jinja2 or matplotlib is not installed.
        ValueError: The content is of another format or version.

    """
    check(content)
    require("jinja2", "matplotlib")
    report = page(content)
    return environment(is_html=True).get_template("report.html").render(page=report, drawn=_drawn(report)) + "\n"


def markdown(content: Mapping[str, Any]) -> str:
    """Return the report as Markdown, without figures; raises the errors of `html`, but does not need matplotlib."""
    check(content)
    require("jinja2")
    text = environment(is_html=False).get_template("report.md").render(page=page(content))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def pdf(content: Mapping[str, Any]) -> bytes:
    """Return the report as a PDF document, with the date of the run; raises the errors of `html`, and needs fpdf2."""
    check(content)
    require("fpdf", "matplotlib")
    from cpd_onnx.report import pdf as writer

    text = (content.get("provenance") or {}).get("date")
    try:
        date = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        date = None
    return writer.pdf(page(content), date)


def check(content: Mapping[str, Any]) -> None:
    """Raise ValueError unless the content is that of a report, of this version or the one before."""
    given = content.get("format"), content.get("version")
    if given not in ((REPORT_FORMAT, 1), (REPORT_FORMAT, REPORT_VERSION)):
        raise ValueError(
            f"format and version of a report must be {REPORT_FORMAT!r} and 1 or {REPORT_VERSION}, "
            f"got {given[0]!r} and {given[1]!r}"
        )


def schema() -> dict[str, Any]:
    """Return the JSON schema of a report's content (draft 2020-12)."""
    found: dict[str, Any] = json.loads(
        resources.files("cpd_onnx.report").joinpath("report.schema.json").read_text("utf-8")
    )
    return found


def require(*modules: str) -> None:
    """Raise UnsupportedError if a module that a page needs is not installed."""
    for module in modules:
        if util.find_spec(module) is None:
            raise UnsupportedError(f"a report needs {module}: pip install 'cpd-onnx[report]'")


def _drawn(report: Page) -> dict[str, list[Any]]:
    """Return the figures by key as SVG elements: the one for screens, and the one for phones."""
    from markupsafe import Markup

    pictures = (part for section in report.sections for part in section.parts if isinstance(part, Picture))
    return {
        picture.key: [
            Markup(drawing.svg(f"{picture.key}-{place}", _printable(picture.label)))
            for place, drawing in enumerate((picture.drawing, picture.on_phones))
        ]
        for picture in pictures
    }


def environment(*, is_html: bool) -> Environment:
    """Return the environment of the templates; in pages, all text is escaped and its unprintable letters replaced."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cpd_onnx.report"), autoescape=is_html, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_printable if is_html else None,
    )  # fmt: skip  # loader and strictness
    environment.filters |= {"md": escaped, "fenced": _fenced}
    return environment


def _printable(value: Any) -> Any:
    """Replace unprintable characters: control characters and lone surrogates, which no file can hold."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in value
    )


def escaped(text: Any) -> str:
    """Return the text on one line, escaped for Markdown."""
    line = _SPECIAL.sub(r"\\\1", " ".join(str(_printable(str(text))).split()))
    return _START.sub(r"\\\1", _NUMBERED.sub(r"\1\\\2", line))


def _fenced(text: str) -> str:
    """Return a fenced code block, with more backticks than the text has in a row."""
    fence = "`" * max(3, 1 + max(map(len, _BACKTICKS.findall(text)), default=0))
    return f"{fence}\n{_printable(text)}\n{fence}"
