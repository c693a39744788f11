"""What a recipe or manifest may name: files in its own folder, and no code.

Either may come from an untrusted source. Anything beyond that is used only if the command line names it as well.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError
from cpd_onnx.options import Named

_FUNCTION = re.compile(r"[\w.]+:\w+")
_NOT_A_FILE = "synthetic"
_FOLDER_KEY = re.compile(r"cache|path|dir|table", re.IGNORECASE)
"""Found in the options of an execution provider that name files: a provider may load compiled code from its cache."""


def taken(
    values: Mapping[str, Any], options: Mapping[str, Named], origin: Path, trusted: Sequence[str]
) -> dict[str, Any]:
    """Return the options that a file may set, with its paths resolved relative to its folder.

    Args:
        values: Values of options by name, without those that the command line overrides.
        options: Options of the command, by name.
        origin: Path of the file.
        trusted: Functions that the command line names.

    Raises:
        CpdError: The file names a function that is not trusted, or a path outside its folder.
    """
    found = dict(values)
    for name, value in values.items():
        named = options[name]
        if names_code(named, value):
            if value not in trusted:
                raise CpdError(
                    f"{origin} names code, {named.key} = {value!r}, which runs only if you name it too: "
                    f"--trust {shlex.quote(value)}"
                )
        elif is_path(named, value):
            place = inside(value, origin, f"--{named.key}")
            found[name] = place if isinstance(value, Path) else str(place)
    return found


def names_code(named: Named, value: Any) -> bool:
    """Return whether the value of an option names a function, which would be imported, or a cache of compiled code."""
    if named.option.takes == "provider":
        return _FOLDER_KEY.search(str(value).partition(":")[2]) is not None
    if named.option.takes not in ("data", "function") or not isinstance(value, str):
        return False
    if named.option.takes == "data":
        return _FUNCTION.fullmatch(value) is not None and Path(value).suffix != ".npz"
    return ":" in value


def is_path(named: Named, value: Any) -> bool:
    """Return whether the value of an option is a file or a folder."""
    if named.option.takes not in ("data", "file", "profile") or value is None or names_code(named, value):
        return False
    if named.option.takes == "profile":
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
