"""Recipes: the options of a command as a TOML file, written beside its output, from which it can be repeated.

Paths in a recipe are relative to its folder, so that files and recipe can be moved together.
"""

from __future__ import annotations

import json
import os
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError
from cpd_onnx.io.files import read_text, require_free, translate_read_errors, write_atomically
from cpd_onnx.io.trust import is_path
from cpd_onnx.options import Named, neighbours, options_of, values_of
from cpd_onnx.version import __version__


def read(path: Path, owner: type) -> dict[str, Any]:
    """Return the values of the options of a request by name; raises CpdError if the file is not a recipe for it."""
    with _translate_errors(path):
        content = read_text(path)
    return parsed(content, owner, path)


def parsed(content: str, owner: type, path: Path) -> dict[str, Any]:
    """Return the values of the options from the text of a recipe; `path` is named in messages."""
    with _translate_errors(path):
        entries = tomllib.loads(content)
    known = {named.key: named for named in _recorded_of(owner)}
    former = {named.former_key: named for named in known.values() if named.former_key}
    entries.pop("made_by", None)
    values = {}
    for key, value in entries.items():
        name = key.replace("_", "-")
        named = known.get(name) or former.get(name)
        if named is None:
            raise CpdError(f"{path}: this command has no option {key!r}{neighbours(key, known)}")
        values[named.name] = _checked(f"{path}: {key} = {reprlib.repr(value)}", value, named)
    return values


def _translate_errors(path: Path) -> AbstractContextManager[None]:
    return translate_read_errors(path, "recipe", f"{path} is not a TOML file", CpdError)


def write(path: Path, request: Any, *, overwrite: bool, owner: type | None = None) -> None:
    """Write the options of a request, restricted to those of the type `owner` if it is given."""
    require_free(path, overwrite=overwrite)
    write_atomically(path, text(request, owner, path.parent).encode())


def text(request: Any, owner: type | None = None, folder: Path | None = None) -> str:
    """Return the text of a recipe, with paths relative to a folder (default: that of the output).

    Raises CpdError for a name that a recipe cannot hold.
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
    """Return a value with its control characters escaped; raises CpdError for a name that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CpdError(f"--{key} {value}: a recipe cannot hold a name that is not UTF-8: rename the file") from error
    return value.replace("\x7f", "\\u007f")


def _recorded_of(owner: type) -> Iterator[Named]:
    return (named for named in options_of(owner) if named.option.is_recorded)


def _checked(where: str, value: Any, named: Named) -> Any:
    """Return a value as the command line would read it; raises CpdError if it is invalid."""
    is_many = named.option.is_many
    if isinstance(value, bool) != named.is_switch or isinstance(value, list) != is_many:
        wanted = "true or false" if named.is_switch else "a list" if is_many else "a single value"
        raise CpdError(f"{where}: must be {wanted}")
    if named.is_switch:
        return value
    try:
        found = named.collected([_single(v, named) for v in value]) if is_many else _single(value, named)
    except ValueError as error:
        raise CpdError(f"{where}: {error}") from error
    if named.option.choices is not None and found not in named.option.choices:
        raise CpdError(f"{where}: must be one of {', '.join(named.option.choices)}")
    return found


def _single(value: Any, named: Named) -> Any:
    """Return one value as the command line would read it; raises ValueError for one of the wrong type."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be a string or a number")
    if named.option.read in (str, Path) and not isinstance(value, str):
        raise ValueError("must be a string")
    return named.option.read(value if isinstance(value, str) else str(value))


def _toml(value: Any, named: Named) -> str:
    """Return a value in TOML syntax."""
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
    """Return a value in command-line syntax: NAME:SIZE,SIZE, NAME=LOW..HIGH, NAME=VALUE or VALUE,VALUE."""
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
