"""Completion scripts for shells, made from the parser of the command line by shtab."""

from __future__ import annotations

import shtab

from cpd_onnx.cli.arguments import actions_of, command_line


def script(shell: str) -> str:
    """What a shell ("bash", "zsh" or "tcsh") reads to complete commands, options, their choices, files and folders."""
    parser = command_line()
    for action in actions_of(parser):
        option = getattr(action, "option", None)
        if action.metavar == "FOLDER":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # this is how shtab is told
        elif option is not None and option.takes in ("file", "data"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # likewise
    return str(shtab.complete(parser, shell=shell))
