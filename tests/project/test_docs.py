"""The documentation does what it says: each block of each page is run, in order, and what a page shows is what comes out.

A page is run in a folder of its own that holds copies of `digits.onnx`, `digits_train.npz` and `digits_test.npz`. What
becomes of a block says the first word behind its fence:

    python           run in the one namespace of the page; with `file=NAME` written to that file instead
    output           what the python block above it printed
    console          lines that start with `$ ` are run (`cpd-onnx` is the command of this tree), what follows is what
                     they print; a last line that starts with `error:` says that the command fails
    json, toml       read; with `file=NAME` also written to that file
    sh               not run, for it installs or is for another machine; commands of ours in it must parse
    (nothing)        not run: a drawing, a grammar; in the README its first block, which tests/project/test_packaging.py holds

Printed text must be what the page shows: words as they are, whole numbers exactly, decimals to 2 %. Not compared are
numbers with an exponent, those before `s`, `ms`, `us` and `MiB`, and hashes. With the word `measured` behind the fence
no number is: it shows times, or values that training ends with, of one machine. A line `…` stands for any lines.
Commands with nothing shown below them only have to succeed. Time decides nothing: `prune`, `compress` and `sweep` are run
with `--no-check-speed` unless the page says otherwise, and what the verdict says of speed is not compared. A block `needs-data` is run where CPD_DATA is set,
one with `needs=MODULE` where there is that module.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import pytest

from cpd_onnx.cli.arguments import command_line
from cpd_onnx.cli.main import main
from cpd_onnx.io.streams import PIPE_CLOSED
from cpd_onnx.rules import RULES
from cpd_onnx.scores.registry import SCORE_FUNCTIONS

ROOT = Path(__file__).parents[2]
DIGITS = ("digits.onnx", "digits_train.npz", "digits_test.npz")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "shared")
LANGUAGES = {"python", "output", "console", "json", "toml", "sh", "", "text"}
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
HASH = re.compile(r"\b(?:[0-9a-f]{64}|[0-9a-f]{12}(?=…)|[0-9a-f]{8}(?=\.data)|[0-9a-f]{16,20}$)", re.M)
COMMAND = re.compile(r"(?:^|&& |ssh \S+ )cpd-onnx (.*?)(?= && |$)")
VARIES = re.compile(r"\d[\d.]*(?:e[+-]?\d+| (?:s|ms|us|MiB)\b)")
SHELL = re.compile(r"[|<>&;*$]|^\w+=")
PROGRESS = re.compile(r"^(?:\d+/\d+ [a-z].*|read|evaluate|[a-z][a-z :]*  \d+ %(?:  .*)?)\n", re.MULTILINE)
"""Matches lines of progress, which a run prints that takes more than ten seconds."""
SPEED = re.compile(r"^(?:faster: |NOT FASTER: |faster\? ).*")
"""Matches the answer of a verdict that depends on time."""
TIMED = re.compile(r"\bcpd-onnx (?:prune|compress|sweep)\b(?!.*--(?:no-)?check-speed\b)")
"""Matches the start of a command that would refuse a model that is not faster on a busy machine."""
HERE = "PYTHONPATH=. "
"""Where modules of the page lie; this process looks there anyway."""

SHIM = """#!{python}
import sys
sys.path.append({root!r})
from cpd_onnx.__main__ import entry
if __name__ == "__main__":  # not where processes of a pool read it again
    entry()
"""


@dataclass(frozen=True)
class Block:
    """What lies between two fences."""

    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str:
        return next(iter(self.words_with("file=")), "")

    def words_with(self, start: str) -> list[str]:
        return [word.removeprefix(start) for word in self.words if word.startswith(start)]


def blocks(text: str) -> Iterator[Block]:
    fence: list[str] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```") and fence is None:
            fence, lines, start = line[3:].split(), [], number
        elif line.startswith("```") and fence is not None:
            yield Block(start, fence[0] if fence else "", tuple(fence[1:]), "\n".join(lines) + "\n")
            fence = None
        else:
            lines.append(line)
    assert fence is None, "a fence is left open"


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block and what is shown below each."""
    command, shown = "", []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            if command:
                yield command, "\n".join(shown)
            command, shown = line[2:], []
            while command.endswith("\\"):
                command = f"{command[:-1].rstrip()} {next(lines).strip()}"
        else:
            assert command, f"line {block.line}: a console block starts with '$ '"
            shown.append(line)
    yield command, "\n".join(shown)


def difference(shown: str, printed: str, *, measured: bool = False) -> str:
    """What a page says otherwise than a run, in words; nothing where both say the same."""
    wanted, found = (_lines(text) for text in (shown, printed))
    skipping = False
    for line in wanted:
        if line == "…":
            skipping = True
            continue
        while skipping and found and not _same(line, found[0], measured=measured):
            found.pop(0)
        if not found or not _same(line, found[0], measured=measured):
            return f"the page shows {line!r}, the run {found[0] if found else 'nothing more'!r}"
        found.pop(0)
        skipping = False
    return f"the run goes on with {found[0]!r}" if found and not skipping else ""


def _lines(text: str) -> list[str]:
    """Lines with something in them, spaces as one, without rulers."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line and set(line) != {"─"}]


def _same(shown: str, printed: str, *, measured: bool) -> bool:
    texts = [VARIES.sub(_unit, HASH.sub("@", SPEED.sub("faster", text))) for text in (shown, printed)]
    words = [NUMBER.sub("#", text) for text in texts]
    numbers = [NUMBER.findall(text) for text in texts]
    return words[0] == words[1] and (measured or all(map(_near, *numbers)))


def _unit(found: re.Match[str]) -> str:
    """`~`, and the unit of a quantity that varies."""
    return f"~ {found[0].split()[1]}" if " " in found[0] else "~"


def _near(shown: str, printed: str) -> bool:
    if "." not in shown:
        return shown == printed
    unit = 10.0 ** -len(shown.partition(".")[2])
    return abs(float(shown) - float(printed)) <= max(1.001 * unit, 0.02 * float(shown))


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("MACs   3.0 M\n──\n", "MACs 3.0 M", True),
        ("85 edits, 0.2 s", "85 edits, 0.9 s", True),
        ("85 edits, 0.2 s", "84 edits, 0.2 s", False),
        ("to 2.1e-07 (allowed 1e-04)", "to 3.3e-06 (allowed 1e-04)", True),
        ("top1 0.9950", "top1 0.9940", True),
        ("top1 0.9950", "top1 0.9450", False),
        ("names sha256 66851d2432cb…, bad", "names sha256 77851d2432cb…, bad", True),
        ("names sha256 66851d2432cb, bad", "names sha256 77851d2432cb, bad", False),
        ("a\n…\nd", "a\nb\nc\nd", True),
        ("a\n…", "a\nb", True),
        ("a\n…\nd", "a\nb\nc", False),
        ("a", "a\nb", False),
        ("a\nb", "a", False),
        ("wrote small.onnx", "wrote large.onnx", False),
        ("faster: 1.30 times as fast", "NOT FASTER: 98.0 % of the time", True),
        ("faster: 1.30 times as fast", "faster? unknown: the latency was not measured", True),
        ("faster: 1.30 times as fast", "smaller: 1.30 times as fast", False),
        ("as good: top1 0.9950", "NOT AS GOOD: top1 0.9950", False),
    ],
)
def test_what_is_taken_for_the_same(shown: str, printed: str, *, is_same: bool) -> None:
    assert (difference(shown, printed) == "") is is_same


def test_measured_numbers_are_not_compared_but_words_are() -> None:
    assert difference("p50 1.25", "p50 7.0", measured=True) == ""
    assert difference("p50 1.25", "p90 1.25", measured=True) != ""


class Run:
    """One page, in its folder."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.module = types.ModuleType(f"page_{page.stem.lower()}")
        self.printed = ""
        shim = folder / ".bin" / "cpd-onnx"
        shim.parent.mkdir()
        shim.write_text(SHIM.format(python=sys.executable, root=str(ROOT)))
        shim.chmod(0o755)
        (shim.parent / "python").symlink_to(sys.executable)

    def block(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"{self.where(block)}: nobody knows what becomes of ```{block.language}"
        if "needs-data" in block.words and not os.environ.get("CPD_DATA"):
            return
        if any(util.find_spec(name) is None for name in block.words_with("needs=")):
            return
        if block.file:
            (self.folder / block.file).write_text(block.text)
        if block.language in ("python", "output", "console", "json", "toml", "sh"):
            getattr(self, block.language)(block)

    def where(self, block: Block) -> str:
        return f"{self.page.name}:{block.line}"

    def compare(self, block: Block, shown: str, printed: str) -> None:
        wrong = difference(shown, printed, measured="measured" in block.words)
        assert not wrong, f"{self.where(block)}: {wrong}\n--- printed:\n{printed}"

    def python(self, block: Block) -> None:
        if block.file:
            compile(block.text, block.file, "exec")
            return
        code = compile("\n" * block.line + block.text, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(code, self.module.__dict__)
        self.printed = stream.getvalue()

    def output(self, block: Block) -> None:
        self.compare(block, block.text, self.printed)

    def json(self, block: Block) -> None:
        json.loads(block.text)

    def toml(self, block: Block) -> None:
        tomllib.loads(block.text)

    def sh(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            for command in COMMAND.findall(line):
                command_line().parse_args(shlex.split(command, comments=True))
            for script in re.findall(r"[\w/]+\.py\b", line):
                assert (ROOT / script).is_file(), f"{self.where(block)}: there is no {script}"

    def console(self, block: Block) -> None:
        for command, shown in commands(block):
            code, printed = self.command(TIMED.sub(r"\g<0> --no-check-speed", command.removeprefix(HERE)))
            last = (_lines(shown) or [""])[-1]
            is_cut = code == PIPE_CLOSED and "| head" in command  # which has seen enough
            assert is_cut or (code != 0) == last.startswith("error:"), (
                f"{self.where(block)}: {command} gave {code}\n{printed}"
            )
            if shown.strip():
                self.compare(block, shown, printed)

    def command(self, command: str) -> tuple[int, str]:
        """A plain command of ours in this process, any other one in one of its own."""
        words = shlex.split(command)
        if words[0] != "cpd-onnx" or SHELL.search(command):
            return self.shell(command)
        with contextlib.redirect_stdout(io.StringIO()) as stream, contextlib.redirect_stderr(stream):
            try:
                code = main(words[1:])
            except SystemExit as stopped:  # of the parser: a usage error, or --help
                code = int(stopped.code or 0)
        return code, PROGRESS.sub("", stream.getvalue())

    def shell(self, command: str) -> tuple[int, str]:
        path = f"{self.folder / '.bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=self.folder, env=environment,
        )  # fmt: skip  # what and how
        return done.returncode, PROGRESS.sub("", done.stdout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's exporter, which pages call, says that it is old
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DIGITS:
        shutil.copy(ROOT / "models" / name, tmp_path)
    run = Run(page, tmp_path)
    if "distill" in page.read_text() or "import torch" in page.read_text():
        pytest.importorskip("torch")
    for name in [Path(block.file).stem for block in blocks(page.read_text()) if block.file]:
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test may have a module of that name
    before = set(sys.modules)
    tables = [(table, dict(table)) for table in (RULES, SCORE_FUNCTIONS)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, run.module.__name__, run.module)
    try:
        for block in blocks(page.read_text()):
            run.block(block)
    finally:
        for path in tmp_path.glob("*.py"):  # what another page writes under that name is another module
            if path.stem not in before:
                sys.modules.pop(path.stem, None)
        for table, content in tables:
            table.clear()
            table.update(content)


def anchors(page: Path) -> set[str]:
    """The headings of a page as a browser names them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.M)
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"
    for name in re.findall(r"`((?:cpd_onnx|passes|tests|benchmarks|models|docs|examples)/[\w/.-]*\.\w+)`", text):
        own = name.replace("cpd_onnx/passes/", "passes/")
        assert (ROOT / own).exists(), f"{page.name} names {name}"


def test_every_page_can_be_reached() -> None:
    linked = set(re.findall(r"\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in PAGES if page.parent.name == "docs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_say_where_the_files_of_their_examples_come_from(page: Path) -> None:
    """A reader who has installed the package has no clone."""
    text = page.read_text()
    is_run = any("digits.onnx" in block.text for block in blocks(text) if block.language in ("console", "python"))
    assert not is_run or "cpd-onnx demo --out example" in text or page.stem in ("CONTRIBUTING", "rules", "security")


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    (choices,) = (action.choices for action in command_line()._actions if isinstance(action.choices, dict))
    assert [name for name in choices if f"cpd-onnx {name}" not in text] == []


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.delitem(sys.modules, "shared", raising=False)  # the generator of C has a module of that name, too
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("shared", None)
    said = capsys.readouterr().out
    rows = ("the original", "the original, trained on", "random channels, distilled", "pruned and repaired")
    for row in (*rows, "pruned, repaired, distilled"):
        assert re.search(rf"^  {row} +[\d.]+ ", said, re.M), row
    assert "verified: equals the original with the removed channels masked" in said
    assert list(tmp_path.iterdir()) == []
