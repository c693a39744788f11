"""What a recipe or manifest may name: files in its own folder, and no code.

Either may come from an untrusted source. Anything beyond that is used only if the command line names it as well.
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
"""Options that take a file or a folder to read or write."""
_DATA = ("data", "eval", "watch")
_FUNCTION = re.compile(r"[\w.]+:\w+")
_NOT_A_FILE = "synthetic"


def take(
    options: argparse.Namespace, said: Mapping[str, Any], origin: Path, trusted: Sequence[str] | None = None
) -> None:
    """Check the options that come from a file, and resolve their paths relative to its folder.

    Args:
        options: Options of the command, updated in place; those whose value is an object in `said` came from the file.
        said: Values in the file, by the names of the options.
        origin: Path of the file.
        trusted: Functions that the command line names; None for a file of the user's own, which may name anything.

    Raises:
        CpdError: The file names a function that is not trusted, or a path outside its folder.
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
    """Return whether an option holds the file's value: that very object, not an equal one from the command line."""
    return value is not None and getattr(options, name, None) is value


def names_code(option: str, value: Any) -> bool:
    """Return whether the value of an option names a function, which would be imported."""
    if option not in FUNCTIONS or not isinstance(value, str):
        return False
    if option in _DATA:
        return _FUNCTION.fullmatch(value) is not None and Path(value).suffix != ".npz"
    return ":" in value


def is_path(option: str, value: Any) -> bool:
    """Return whether the value of an option is a file or a folder."""
    if option not in FILES or value is None or names_code(option, value):
        return False
    if option == "profile":
        return str(value).endswith(".toml")  # otherwise the name of a built-in profile
    return str(value) != _NOT_A_FILE


def inside(value: str | Path, origin: Path, option: str) -> Path:
    """Return a path that a file names, resolved relative to the file's folder.

    Raises CpdError if it is outside that folder, also through links; `option` is the option that would allow it.
    """
    base = origin.parent.resolve()
    place = base / value
    if not _is_within(place, base):
        typed = os.path.normpath(origin.parent / value)  # relative to the working directory
        raise CpdError(
            f"{origin} names {str(value)!r}, which is outside its folder; to use it, name it on the command line: "
            f"{option} {shlex.quote(typed)}"
        )
    return place


def _is_within(place: Path, base: Path) -> bool:
    """Return whether a path and everything below it lies within a folder once links are resolved."""
    try:
        if not place.resolve().is_relative_to(base):
            return False
        links = (path for path in place.rglob("*") if path.is_symlink()) if place.is_dir() else ()
        return all(path.resolve().is_relative_to(base) for path in links)
    except (OSError, ValueError, RuntimeError):  # an invalid file name, or circular links
        return False


def _key(option: str) -> str:
    return option.replace("_", "-")
