"""What a recipe or a manifest may do: name files of its own folder, and no code.

Either may come from a stranger. What it names beyond that counts only if the command line names it as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError

FUNCTIONS = ("data", "eval", "watch", "score", "metric", "executor")
"""Options that take `module:function`."""
FILES = ("data", "eval", "watch", "cost_table", "profile", "like", "teacher_cache", "log", "tensorboard")
"""Options that take a file or a folder, to read it or to write it."""
_DATA = ("data", "eval", "watch")
_FUNCTION = re.compile(r"[\w.]+:\w+")
_NOT_A_FILE = "synthetic"


def take(
    options: argparse.Namespace, said: Mapping[str, Any], origin: Path, trusted: Sequence[str] | None = None
) -> None:
    """Take what a file says, as far as the command line does not say otherwise: its paths are as seen from its folder.

    Args:
        options: those of the command; those that are values of `said` came from the file.
        said: what the file says, by the names of the options.
        origin: the file.
        trusted: functions that the command line names; None for a file of our own, which may name anything.

    Raises:
        CpdError: a function is named that is not trusted, or a path that leaves the folder.
    """
    for name, value in said.items():
        if not _is_from_there(options, name, value):
            continue
        if names_code(name, value):
            if trusted is not None and value not in trusted:
                raise CpdError(
                    f"{origin} names code, {_key(name)} = {str(value)!r}, which runs only if you name it too: "
                    f"--trust {shlex.quote(value)}"
                )
            setattr(options, name, str(value))
        elif is_path(name, value):
            place = origin.parent.resolve() / value if trusted is None else inside(value, origin, f"--{_key(name)}")
            setattr(options, name, place if isinstance(value, Path) else str(place))


def _is_from_there(options: argparse.Namespace, name: str, value: Any) -> bool:
    """Whether an option has the value of the file: that very object, not one that was typed alike."""
    return value is not None and getattr(options, name, None) is value


def names_code(option: str, value: Any) -> bool:
    """Whether the value of an option is a function that would be imported."""
    if option not in FUNCTIONS or not isinstance(value, str):
        return False
    if option in _DATA:
        return _FUNCTION.fullmatch(value) is not None and Path(value).suffix != ".npz"
    return ":" in value


def is_path(option: str, value: Any) -> bool:
    """Whether the value of an option is a file or a folder."""
    if option not in FILES or value is None or names_code(option, value):
        return False
    if option == "profile":
        return str(value).endswith(".toml")  # else the name of one that comes with the package
    return str(value) != _NOT_A_FILE


def inside(value: str | Path, origin: Path, option: str) -> Path:
    """Where a path leads that a file names, as seen from its folder.

    Raises CpdError if that is outside the folder, also through links; `option` is how to name it on the command line.
    """
    base = origin.parent.resolve()
    place = base / value
    if not _is_within(place, base):
        typed = os.path.normpath(origin.parent / value)  # as seen from here
        raise CpdError(
            f"{origin} names {str(value)!r}, which is outside its folder: if it should be used, name it yourself: "
            f"{option} {shlex.quote(typed)}"
        )
    return place


def _is_within(place: Path, base: Path) -> bool:
    """Whether a path, and all that a folder holds, lies below a folder; links count by where they lead."""
    try:
        if not place.resolve().is_relative_to(base):
            return False
        links = (path for path in place.rglob("*") if path.is_symlink()) if place.is_dir() else ()
        return all(path.resolve().is_relative_to(base) for path in links)
    except (OSError, ValueError, RuntimeError):  # no name that a file can have, or links in a circle
        return False


def _key(option: str) -> str:
    return option.replace("_", "-")
