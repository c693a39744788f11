"""The command line, made of the requests: an argument for each option."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from typing import Any, NoReturn

from cpd_onnx.io import trust
from cpd_onnx.io.streams import printable
from cpd_onnx.options import Named, build, options_of
from cpd_onnx.version import __version__
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.requests import COMMANDS

_REQUEST = "request"
"""Name among the arguments of the class of the request."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and show what was typed without obeying it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with exit code 2."""
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands: what it gives has only what was typed, by the names of the options."""
    parser = _Parser(
        prog="cpd-onnx", description="Make a trained ONNX model smaller and faster, and prove that nothing broke."
    )
    parser.add_argument("--version", action="version", version=f"cpd-onnx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, owner in COMMANDS.items():
        about = (inspect.getdoc(owner) or "").splitlines()[0]
        command = commands.add_parser(
            name, help=_lowered(about).removesuffix("."), description=about, argument_default=argparse.SUPPRESS
        )
        groups: dict[str, Any] = {"": command}
        for named in options_of(owner):
            title = named.option.group
            if title not in groups:
                groups[title] = command.add_argument_group(title)
            _add(groups[title], named)
        command.set_defaults(**{_REQUEST: owner})
    return parser


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:]


def _add(place: Any, named: Named) -> None:
    """The argument of an option."""
    option = named.option
    words: dict[str, Any] = {"help": help_of(named).replace("%", "%%")}
    if named.is_positional:
        more: dict[str, Any] = {"nargs": "+"} if option.is_many else {}
        kinds = {"choices": option.choices} if option.choices else {"type": _typed(option.read)}
        action = place.add_argument(named.name, metavar=option.metavar, **kinds, **more, **words)
    elif named.is_switch:
        kind: Any = "store_true" if named.default is False else argparse.BooleanOptionalAction
        action = place.add_argument(f"--{named.key}", dest=named.name, action=kind, **words)
    else:
        flags = option.flag.split("/") if "/" in option.flag else [f"--{named.key}"]
        more = {"action": "append"} if option.is_many else {"required": named.default is MISSING}
        action = place.add_argument(
            *flags, dest=named.name, type=_typed(option.read), choices=option.choices, metavar=option.metavar, **more,
            **words,
        )  # fmt: skip  # what and how
    action.option = option  # what completion wants to know


def _typed(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader whose complaint argparse shows as it is."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def help_of(named: Named) -> str:
    """What an option is for, and its default."""
    words, default = named.option.help, default_of(named)
    return _lowered(words) if not default or "(default:" in words else f"{_lowered(words)} (default: {default})"


def default_of(named: Named) -> str:
    """The default of an option as it would be typed; nothing where there is none."""
    default = named.default
    if default is MISSING or default is None or default is False or default in ((), {}):
        return ""
    if default is True:
        return "yes"
    if isinstance(default, tuple):
        return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def request_of(arguments: argparse.Namespace) -> Any:
    """The request that was typed, with what its recipe says beside; raises CpdError for what is wrong with that."""
    typed = {name: value for name, value in vars(arguments).items() if name not in (_REQUEST, "verbose")}
    owner = getattr(arguments, _REQUEST)
    options = {named.name: named for named in options_of(owner)}
    values = {name: options[name].collected(value) for name, value in typed.items()}
    if "recipe" in values:
        said = recipe.read(values["recipe"], owner)
        left = {name: value for name, value in said.items() if name not in values or options[name].option.is_many}
        found = trust.taken(left, options, values["recipe"], values.get("trust", ()))
        values = {name: options[name].joined(found.get(name), values.get(name)) for name in {*found, *values}}
    return build(owner, values)


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of all commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)
