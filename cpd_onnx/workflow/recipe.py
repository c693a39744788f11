"""Recipes: the options of a command as a TOML file, written beside what it made and read again to repeat it.

Paths in a recipe are as seen from its folder, so that both can be moved together.
"""

from __future__ import annotations

import argparse
import json
import os
import reprlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError
from cpd_onnx.io.files import read_text, require_free, write_atomically
from cpd_onnx.io.trust import is_path
from cpd_onnx.version import __version__

_NOT_OPTIONS = {"help", "recipe", "output", "force", "json", "resume", "checkpoint", "verbose", "plan", "trust"}
"""What is said anew each time: where things go, and what becomes of what is there."""


class _Said(str):
    """A text of a recipe: another object than what was typed, even where it is the same."""

    __slots__ = ()


def read(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults for the options of a command.

    Raises CpdError if the file is no recipe for it.
    """
    try:
        content = read_text(path)
    except OSError as error:
        raise CpdError(f"cannot read recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CpdError(f"{path} is not a TOML file: {error}") from error
    return parsed(content, parser, path)


def parsed(content: str, parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The same from the text of a recipe, which lies at `path`."""
    try:
        said = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # a number of too many digits is no TOMLDecodeError
        raise CpdError(f"{path} is not a TOML file: {_reason(error)}") from error
    known = {action.dest: action for action in _options(parser)}
    said.pop("made_by", None)
    values = {}
    for key, value in said.items():
        action = known.get(key.replace("-", "_"))
        if action is None:
            raise CpdError(f"{path}: this command has no option {key!r}")
        found = _checked(path, key, value, action)
        values[action.dest] = _Said(found) if isinstance(found, str) else found
    return values


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def write(
    path: Path, options: argparse.Namespace, *, overwrite: bool, command: argparse.ArgumentParser | None = None
) -> None:
    """Put the options of a command on record; those that another one has too, if that is given."""
    require_free(path, overwrite=overwrite)
    write_atomically(path, text(options, command, path.parent).encode())


def text(
    options: argparse.Namespace, command: argparse.ArgumentParser | None = None, folder: Path | None = None
) -> str:
    """What `write` writes, with paths as seen from a folder, that of the output unless another one is given.

    Raises CpdError where a name cannot be put on record.
    """
    lines = [f'made_by = "cpd-onnx {__version__}"']
    for action in _options(command or options.command):
        value = getattr(options, action.dest, None)
        if value is None:
            continue
        key = action.dest.replace("_", "-")
        if is_path(action.dest, value):
            value = Path(os.path.relpath(value, options.output.parent if folder is None else folder)).as_posix()
        lines.append(f"{key} = {_recorded(key, _toml(value, action))}")
    return "\n".join(lines) + "\n"


def _recorded(key: str, value: str) -> str:
    """A value as TOML can hold it; CpdError for a name that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CpdError(f"--{key} {value}: a recipe cannot hold a name that is not UTF-8: give it another") from error
    return value.replace("\x7f", "\\u007f")


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (a for a in parser._actions if a.option_strings and a.dest not in _NOT_OPTIONS)


def _checked(path: Path, key: str, value: Any, action: argparse.Action) -> Any:
    """A value as the command line would have it; texts are read as there."""
    where = f"{path}: {key} = {reprlib.repr(value)}"
    is_flag, is_list = action.nargs == 0, isinstance(action.default, list)
    if isinstance(value, bool) != is_flag or isinstance(value, list) != is_list:
        wanted = "true or false" if is_flag else "a list" if is_list else "one value"
        raise CpdError(f"{where}: it should be {wanted}")
    if is_flag:
        return value
    try:
        found = [_single(v, action) for v in value] if is_list else _single(value, action)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise CpdError(f"{where}: {error}") from error
    if action.choices is not None and found not in action.choices:
        raise CpdError(f"{where}: choose one of {', '.join(map(str, action.choices))}")
    return found


def _single(value: Any, action: argparse.Action) -> Any:
    """One value; ValueError where it is no text, and no number where one can be."""
    if not callable(action.type):
        if not isinstance(value, str):
            raise ValueError("it should be a text")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("it should be a text or a number")
    return action.type(value if isinstance(value, str) else str(value))


def _toml(value: Any, action: argparse.Action) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v, action) for v in value) + "]"
    if isinstance(value, tuple):
        return json.dumps(_tuple_text(value), ensure_ascii=False)
    return json.dumps(str(value), ensure_ascii=False)


def _tuple_text(value: tuple[Any, ...]) -> str:
    """As it is said on the command line: NAME:SIZE,SIZE, NAME=LOW..HIGH, NAME=NUMBER or values with commas."""
    if len(value) != 2 or not isinstance(value[0], str):
        return ",".join(map(repr, value))
    name, content = value
    if not isinstance(content, tuple):
        return f"{name}={content:g}"
    if all(isinstance(part, int) for part in content):
        return f"{name}:{','.join(map(str, content))}"
    return f"{name}={'..'.join(map(repr, content))}"
