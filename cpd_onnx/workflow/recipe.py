"""Recipes: the options of a command as a TOML file, written beside what it made and read again to repeat it.

Paths in a recipe are as seen from its folder, so that both can be moved together.
"""

from __future__ import annotations

import json
import os
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError
from cpd_onnx.io.files import read_text, require_free, write_atomically
from cpd_onnx.io.trust import is_path
from cpd_onnx.options import Named, neighbours, options_of, values_of
from cpd_onnx.version import __version__


def read(path: Path, owner: type) -> dict[str, Any]:
    """Values for the options of a request, by name.

    Raises CpdError if the file is no recipe for it.
    """
    try:
        content = read_text(path)
    except OSError as error:
        raise CpdError(f"cannot read recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CpdError(f"{path} is not a TOML file: {error}") from error
    return parsed(content, owner, path)


def parsed(content: str, owner: type, path: Path) -> dict[str, Any]:
    """The same from the text of a recipe, which lies at `path`."""
    try:
        said = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # a number of too many digits is no TOMLDecodeError
        raise CpdError(f"{path} is not a TOML file: {_reason(error)}") from error
    known = {named.key: named for named in _recorded_of(owner)}
    said.pop("made_by", None)
    values = {}
    for key, value in said.items():
        named = known.get(key.replace("_", "-"))
        if named is None:
            raise CpdError(f"{path}: this command has no option {key!r}{neighbours(key, known)}")
        values[named.name] = _checked(f"{path}: {key} = {reprlib.repr(value)}", value, named)
    return values


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def write(path: Path, request: Any, *, overwrite: bool, owner: type | None = None) -> None:
    """Put the options of a request on record; those that another one has too, if that is given."""
    require_free(path, overwrite=overwrite)
    write_atomically(path, text(request, owner, path.parent).encode())


def text(request: Any, owner: type | None = None, folder: Path | None = None) -> str:
    """What `write` writes, with paths as seen from a folder, that of the output unless another one is given.

    Raises CpdError where a name cannot be put on record.
    """
    lines = [f'made_by = "cpd-onnx {__version__}"']
    values = values_of(request)
    for named in _recorded_of(owner or type(request)):
        value = values.get(named.name)
        if value is None:
            continue
        if is_path(named, value):
            value = Path(os.path.relpath(value, request.output.parent if folder is None else folder)).as_posix()
        lines.append(f"{named.key} = {_recorded(named.key, _toml(value, named))}")
    return "\n".join(lines) + "\n"


def _recorded(key: str, value: str) -> str:
    """A value as TOML can hold it; CpdError for a name that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CpdError(f"--{key} {value}: a recipe cannot hold a name that is not UTF-8: give it another") from error
    return value.replace("\x7f", "\\u007f")


def _recorded_of(owner: type) -> Iterator[Named]:
    return (named for named in options_of(owner) if named.option.is_recorded)


def _checked(where: str, value: Any, named: Named) -> Any:
    """A value as the command line would have it; texts are read as there."""
    is_many = named.option.is_many
    if isinstance(value, bool) != named.is_switch or isinstance(value, list) != is_many:
        wanted = "true or false" if named.is_switch else "a list" if is_many else "one value"
        raise CpdError(f"{where}: it should be {wanted}")
    if named.is_switch:
        return value
    try:
        found = named.collected([_single(v, named) for v in value]) if is_many else _single(value, named)
    except ValueError as error:
        raise CpdError(f"{where}: {error}") from error
    if named.option.choices is not None and found not in named.option.choices:
        raise CpdError(f"{where}: choose one of {', '.join(named.option.choices)}")
    return found


def _single(value: Any, named: Named) -> Any:
    """One value; ValueError where it is no text, and no number where one can be."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("it should be a text or a number")
    if named.option.read in (str, Path) and not isinstance(value, str):
        raise ValueError("it should be a text")
    return named.option.read(value if isinstance(value, str) else str(value))


def _toml(value: Any, named: Named) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if named.option.is_many:
        entries = value.items() if isinstance(value, Mapping) else value
        return "[" + ", ".join(_quoted(_text_of(entry, named)) for entry in entries) + "]"
    return _quoted(_text_of(value, named))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text_of(value: Any, named: Named) -> str:
    """As it is said on the command line: NAME:SIZE,SIZE, NAME=LOW..HIGH, NAME=VALUE or values with commas."""
    if not isinstance(value, tuple):
        return str(value)
    if len(value) != 2 or not isinstance(value[0], str):
        return ",".join(map(repr, value))
    name, content = value
    if not isinstance(content, tuple):
        return f"{name}={content}" if isinstance(content, str) else f"{name}={content:g}"
    form = str(named.option.metavar)
    sign, between = ":" if ":" in form else "=", ".." if ".." in form else ","
    return f"{name}{sign}{between.join(map(repr, content))}"
