"""Generator of the table of all options in docs/options.md, from the requests.

python -m cpd_onnx.cli.reference docs/options.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cpd_onnx.cli.arguments import default_of
from cpd_onnx.io.files import read_text, write_atomically
from cpd_onnx.options import options_of
from cpd_onnx.workflow.requests import COMMANDS

_IN_WORDS = re.compile(r" \(default: ([^)]*)\)")
"""Matches a default that the help text describes in words."""
HEADING = "## All options\n"
_ABOUT = """
The `--help` of every command in one table; keys of a recipe are the same names without the leading hyphens. The table
is generated from the requests in `cpd_onnx/workflow/requests.py` and the options of the passes by
`python -m cpd_onnx.cli.reference docs/options.md`.

| option | description | default | commands |
|---|---|---|---|
"""


def table() -> str:
    """Return the section, with one row per option; commands for which the option means the same share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for command, owner in COMMANDS.items():
        for named in options_of(owner):
            if not named.is_positional:
                described = _IN_WORDS.search(named.option.help)
                default = described[1] if described else default_of(named)
                text = _IN_WORDS.sub("", named.option.help)
                rows.setdefault((named.key, text, default), []).append(command)
    cells = ((f"`--{key}`", text, default, ", ".join(commands)) for (key, text, default), commands in rows.items())
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in sorted(cells)]
    return HEADING + _ABOUT + "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """Return a page whose last section, that of the heading, is replaced by the table."""
    return page.partition(HEADING)[0] + table()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_atomically(place, updated(read_text(place)).encode())
