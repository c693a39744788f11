"""The help, which fits a screen, and usage errors, which are one line that names what was meant."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import MISSING

import pytest

from cpd_onnx.cli.arguments import command_line, request_of
from cpd_onnx.cli.main import main
from cpd_onnx.options import options_of
from cpd_onnx.workflow.requests import COMMANDS

SCREEN = 40
"""Lines that the help of a command may take."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_fits_a_screen(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, text, said = printed(capsys, *([command] if command else []), "--help")
    lines = text.splitlines()
    assert (code, said) == (0, "")
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= min(columns, 100)


@pytest.mark.parametrize("command", COMMANDS)
def test_all_help_has_all_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, everything, _ = printed(capsys, command, "--help-all")
    _, brief, _ = printed(capsys, command, "--help")
    assert code == 0
    for named in options_of(COMMANDS[command]):
        word = named.name.upper() if named.is_positional else f"--{named.key}"
        shown = named.option.metavar if named.is_positional and named.option.metavar else word
        assert shown in everything
        if named.default is MISSING or named.option.is_common:
            assert shown in brief
    assert "--help-all" in brief


def test_help_of_compress_has_the_main_options_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    _, brief, _ = printed(capsys, "compress", "--help")
    for flag in ("--output", "--target", "--data", "--eval", "--metric", "--keep", "--profile", "--force"):
        assert f"{flag} " in brief
    assert "--clip-norm" not in brief
    assert brief.count("  cpd-onnx compress ") == 3


def examples() -> Iterator[str]:
    for owner in COMMANDS.values():
        yield from getattr(owner, "examples", ())


@pytest.mark.parametrize("example", [*examples()])
def test_examples_are_valid(example: str) -> None:
    request = request_of(command_line().parse_args(shlex.split(example)))
    assert example in type(request).examples


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("compres m.onnx", "unknown command 'compres' (did you mean compress?); see cpd-onnx --help"),
        ("xyzzy", "unknown command 'xyzzy'; see cpd-onnx --help"),
        ("", "missing COMMAND; see cpd-onnx --help"),
        ("--versoin", "unknown option --versoin (did you mean --version?); see cpd-onnx --help"),
        ("prune m.onnx --ouput s.onnx", "unknown option --ouput (did you mean --output?); see cpd-onnx prune --help"),
        ("prune m.onnx --ouput=s.onnx", "unknown option --ouput (did you mean --output?); see cpd-onnx prune --help"),
        ("prune m.onnx -output s.onnx", "unknown option -output (did you mean --output?); see cpd-onnx prune --help"),
        ("prune m.onnx -o s --plolicy global", "unknown option --plolicy (did you mean --policy?); see cpd-onnx prune --help"),
        ("prune m.onnx -o s -q", "unknown option -q; see cpd-onnx prune --help"),
        ("prune m.onnx -o s --policy optimum", "--policy: 'optimum' is not one of uniform, global, isomorphic, optimal "
         "(did you mean optimal?); see cpd-onnx prune --help"),
        ("completion fsh", "SHELL: 'fsh' is not one of bash, zsh, tcsh, fish (did you mean fish?); see cpd-onnx completion --help"),
        ("prune m.onnx -o s --target", "--target needs a value; see cpd-onnx prune --help"),
        ("prune m.onnx -o s --keep --force", "--keep needs a value; see cpd-onnx prune --help"),
        ("prune m.onnx", "missing -o/--output; see cpd-onnx prune --help"),
        ("prune a.onnx b.onnx -o s", "unexpected argument: b.onnx; see cpd-onnx --help"),
        ("prune m.onnx -o s --rounds 0", "--rounds: 0 is not a whole number of at least 1; see cpd-onnx prune --help"),
        ("prune m.onnx -o s --force=yes", "--force: ignored explicit argument 'yes'; see cpd-onnx prune --help"),
        ("prune m.onnx -o s --\x1b[2J", "unexpected argument: --\\x1b[2J; see cpd-onnx --help"),
    ],
)  # fmt: skip  # a table
def test_usage_errors_are_one_line(line: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, *line.split(" ")[: len(line)]) == (2, "", f"error: {error}\n")


@pytest.mark.parametrize(
    "line",
    ["prune -osmall.onnx m.onnx", "prune m.onnx -o s --outp t", "prune m.onnx -o s --json -", "prune -o s -- -m.onnx",
     "deploy m.onnx -o s --seed 1", "prune m.onnx -o=s", "-v prune m.onnx -o s", "prune m.onnx -o s -v"],
)  # fmt: skip  # a table
def test_what_argparse_takes_is_still_taken(line: str) -> None:
    assert isinstance(command_line().parse_args(line.split()), argparse.Namespace)


def test_verbose_may_follow_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["--verbose", "inspect", "nowhere.onnx"], ["inspect", "nowhere.onnx", "--verbose"]):
        assert main(line) == 1
        assert "Traceback" in capsys.readouterr().err
    assert main(["inspect", "nowhere.onnx"]) == 1
    assert "Traceback" not in capsys.readouterr().err
