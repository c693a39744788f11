"""Completion scripts for shells, made from the parser of the command line by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

from cpd_onnx.cli.arguments import command_line

_FILES = {"data", "eval", "watch", "json"}
"""Options that may name a file but need not."""


def script(shell: str) -> str:
    """What a shell ("bash", "zsh" or "tcsh") reads to complete commands, options, their choices, files and folders."""
    parser = command_line()
    for action in _actions(parser):
        if action.metavar == "FOLDER":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # this is how shtab is told
        elif action.type is Path or action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # likewise
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of all commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
