"""The parser of the command line, built from the requests: one argument per option."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from cpd_onnx.io import trust
from cpd_onnx.io.streams import print_error, printable
from cpd_onnx.moved import GONE_IN
from cpd_onnx.options import Named, build, options_of
from cpd_onnx.version import __version__
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.requests import COMMANDS, Request

_REQUEST = "request"
"""Attribute of the parsed arguments that holds the class of the request."""
_OF_ALL = {entry.name for entry in fields(Request)}
"""Names of the options that every command has."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, in which control characters are escaped."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")


class _Renamed(argparse.Action):
    """A hidden option under its former name: it sets the one that is now used instead, and says so."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        """Store the value, after a line on stderr."""
        new = self.dest.replace("_", "-")
        print_error(f"warning: {self.option_strings[0]} is now --{new}; the old name goes in version {GONE_IN}")
        setattr(namespace, self.dest, values)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all commands; its result holds only the options that were given, by their names."""
    parser = _Parser(
        prog="cpd-onnx", description="Make a trained ONNX model smaller and faster, and prove the result correct."
    )
    parser.add_argument("--version", action="version", version=f"cpd-onnx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, owner in COMMANDS.items():
        description = (inspect.getdoc(owner) or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=_lowered(description).removesuffix("."),
            description=description,
            argument_default=argparse.SUPPRESS,
        )
        groups: dict[str, Any] = {"": command}
        for named in sorted(options_of(owner), key=_rank):
            title = named.option.group
            if title not in groups:
                groups[title] = command.add_argument_group(title)
            _add(groups[title], named)
        command.set_defaults(**{_REQUEST: owner})
    return parser


def _rank(named: Named) -> int:
    """Return the sort key of an option in the help: required options first, those of every command last."""
    return 0 if named.default is MISSING else 2 if named.name in _OF_ALL else 1


def _lowered(text: str) -> str:
    """Return the text with a lower-case first letter, unless its first word is an acronym or a placeholder."""
    return text if text[:2].isupper() else text[0].lower() + text[1:]


def _add(group: Any, named: Named) -> None:
    """Add the argument of an option to a group of the parser."""
    option = named.option
    if named.former_key:
        group.add_argument(
            f"--{named.former_key}", dest=named.name, type=_typed(option.read), choices=option.choices,
            metavar=option.metavar, help=argparse.SUPPRESS, action=_Renamed,
        )  # fmt: skip  # what and how
    help_text = help_of(named).replace("%", "%%")
    if named.is_positional:
        more: dict[str, Any] = {"nargs": "+"} if option.is_many else {}
        kinds = {"choices": option.choices} if option.choices else {"type": _typed(option.read)}
        action = group.add_argument(named.name, metavar=option.metavar, help=help_text, **kinds, **more)
    elif named.is_switch:
        kind: Any = "store_true" if named.default is False else argparse.BooleanOptionalAction
        action = group.add_argument(f"--{named.key}", dest=named.name, action=kind, help=help_text)
    else:
        flags = option.flag.split("/") if "/" in option.flag else [f"--{named.key}"]
        more = {"action": "append"} if option.is_many else {"required": named.default is MISSING}
        action = group.add_argument(
            *flags,
            dest=named.name,
            type=_typed(option.read),
            choices=option.choices,
            metavar=option.metavar,
            help=help_text,
            **more,
        )
    action.option = option  # read by completion


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader whose ValueError argparse shows unchanged."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def help_of(named: Named) -> str:
    """Return the help text of an option, with its default."""
    text, default = _lowered(named.option.help), default_of(named)
    return text if not default or "(default:" in text else f"{text} (default: {default})"


def default_of(named: Named) -> str:
    """Return the default of an option as it would be typed; an empty text if it has none."""
    default = named.default
    if default is MISSING or default is None or default is False or default in ((), {}):
        return ""
    if default is True:
        return "yes"
    if isinstance(default, tuple):
        return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def request_of(arguments: argparse.Namespace) -> Any:
    """Return the request that the arguments describe, completed from its recipe; raises CpdError if that is invalid."""
    typed = {name: value for name, value in vars(arguments).items() if name not in (_REQUEST, "verbose")}
    owner = getattr(arguments, _REQUEST)
    options = {named.name: named for named in options_of(owner)}
    values = {name: options[name].collected(value) for name, value in typed.items()}
    if "recipe" in values:
        recorded = recipe.read(values["recipe"], owner)
        used = {name: value for name, value in recorded.items() if name not in values or options[name].option.is_many}
        trusted = trust.taken(used, options, values["recipe"], values.get("trust", ()))
        values = {name: options[name].joined(trusted.get(name), values.get(name)) for name in {*trusted, *values}}
    return build(owner, values)


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of the parser and of all its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)
