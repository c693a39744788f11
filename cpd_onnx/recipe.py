"""Recipes: the options of a command as a TOML file, written beside what it made and read again to repeat it."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError
from cpd_onnx.files import require_free, write_atomically
from cpd_onnx.version import __version__

_NOT_OPTIONS = {"help", "recipe", "output", "force", "json", "resume", "checkpoint", "verbose", "plan"}
"""What is said anew each time: where things go, and what becomes of what is there."""


def read(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults for the options of a command.

    Raises CpdError if the file is no recipe for it.
    """
    try:
        return parsed(path.read_text(encoding="utf-8"), parser, path)
    except OSError as error:
        raise CpdError(f"cannot read recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CpdError(f"{path} is no TOML file: {error}") from error


def parsed(content: str, parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The same from the text of a recipe, which lies at `path`."""
    try:
        said = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise CpdError(f"{path} is no TOML file: {error}") from error
    known = {action.dest: action for action in _options(parser)}
    said.pop("made_by", None)
    values = {}
    for key, value in said.items():
        action = known.get(key.replace("-", "_"))
        if action is None:
            raise CpdError(f"{path}: this command has no option {key!r}")
        values[action.dest] = _checked(path, key, value, action)
    return values


def write(
    path: Path, options: argparse.Namespace, *, overwrite: bool, command: argparse.ArgumentParser | None = None
) -> None:
    """Put the options of a command on record; those that another one has too, if that is given."""
    require_free(path, overwrite=overwrite)
    write_atomically(path, text(options, command).encode())


def text(options: argparse.Namespace, command: argparse.ArgumentParser | None = None) -> str:
    """What `write` writes."""
    lines = [f'made_by = "cpd-onnx {__version__}"']
    for action in _options(command or options.command):
        value = getattr(options, action.dest, None)
        if value is not None:
            lines.append(f"{action.dest.replace('_', '-')} = {_toml(value, action)}")
    return "\n".join(lines) + "\n"


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (a for a in parser._actions if a.option_strings and a.dest not in _NOT_OPTIONS)


def _checked(path: Path, key: str, value: Any, action: argparse.Action) -> Any:
    """A value as the command line would have it; texts are read as there."""
    read_text = action.type if callable(action.type) else lambda text: text
    try:
        found = [read_text(v) if isinstance(v, str) else v for v in value] if isinstance(value, list) else (
            read_text(value) if isinstance(value, str) else value
        )  # fmt: skip
        if not isinstance(value, (str, list, bool)) and callable(action.type):
            found = read_text(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise CpdError(f"{path}: {key} = {value!r}: {error}") from error
    if action.choices is not None and found not in action.choices:
        raise CpdError(f"{path}: {key} = {value!r}: choose one of {', '.join(map(str, action.choices))}")
    is_flag, is_list = action.nargs == 0, isinstance(action.default, list)
    if isinstance(found, bool) != is_flag or isinstance(found, list) != is_list:
        wanted = "true or false" if is_flag else "a list" if is_list else "one value"
        raise CpdError(f"{path}: {key} = {value!r}: it should be {wanted}")
    return found


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
