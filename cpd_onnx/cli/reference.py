"""The table of all options in docs/options.md, made of the requests.

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
"""Where the help says the default in words."""
HEADING = "## All options\n"
_ABOUT = """
What `--help` says of each command, in one table; a recipe has the same names without the hyphens. It is made of the
requests in `cpd_onnx/workflow/requests.py` and the options of the passes, by
`python -m cpd_onnx.cli.reference docs/options.md`.

| option | what it is for | default | commands |
|---|---|---|---|
"""


def table() -> str:
    """The section, with one row for each option; commands in which it means the same share it."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for command, owner in COMMANDS.items():
        for named in options_of(owner):
            if not named.is_positional:
                said = _IN_WORDS.search(named.option.help)
                default = said[1] if said else default_of(named)
                words = _IN_WORDS.sub("", named.option.help)
                rows.setdefault((named.key, words, default), []).append(command)
    cells = ((f"`--{key}`", words, default, ", ".join(commands)) for (key, words, default), commands in rows.items())
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in sorted(cells)]
    return HEADING + _ABOUT + "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """A page whose section of that heading, the last one, is the table."""
    return page.partition(HEADING)[0] + table()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_atomically(place, updated(read_text(place)).encode())
