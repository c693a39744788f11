"""The parser of the command line, built from the requests: one argument per option."""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from cpd_onnx.io import trust
from cpd_onnx.io.streams import printable
from cpd_onnx.moved import GONE_IN
from cpd_onnx.options import Named, Option, build, neighbours, options_of
from cpd_onnx.version import __version__
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.requests import COMMANDS, Request

_REQUEST = "request"
"""Attribute of the parsed arguments that holds the class of the request."""
_OF_ALL = {entry.name for entry in fields(Request)}
"""Names of the options that every command has."""


_LINES = 40
"""Lines of a screen, up to which `--help` shows all options of a command."""
_COLUMNS = 100
"""Columns that the help fills at most."""
_OPTION = re.compile(r"--?[^\W\d][^\s=]*(?:=.*)?", re.DOTALL)
"""Matches an argument that is an option, rather than a value such as "-1", "-" or a phrase."""
_SAID = (
    (re.compile(r"^argument "), ""),
    (re.compile(r": expected (?:one|at least one) argument$"), " needs a value"),
    (re.compile(r"^the following arguments are required: "), "missing "),
    (re.compile(r"^unrecognized arguments: "), "unexpected argument: "),
)
"""Phrases of argparse in its error messages, and what is said instead."""


class _Formatter(argparse.HelpFormatter):
    """Help in which an option with several flags names its value once."""

    def __init__(self, prog: str) -> None:
        width = min(_COLUMNS, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=34, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help fits a screen.

    Where all options would take more than a screen, `--help` shows the common ones with the first phrase of their
    description, and `--help-all` all of them.
    """

    def __init__(self, **more: Any) -> None:
        """Create a parser; the arguments are those of argparse."""
        super().__init__(formatter_class=_Formatter, add_help=False, **more)
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        for said, better in _SAID:
            message = said.sub(better, message)
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but name an unknown option before anything that is missing because of it."""
        given = sys.argv[1:] if args is None else list(args)
        for text in given:
            if text == "--" or (self._subparsers is not None and not text.startswith("-")):
                break  # what follows is not an option, or belongs to a command
            self._require_known(text)
        return super().parse_known_args(given, namespace)

    def _require_known(self, text: str) -> None:
        """Exit with an error if an argument is an option that does not exist."""
        name = text.partition("=")[0]
        if not _OPTION.fullmatch(text) or any(flag.startswith(name) for flag in self._option_string_actions):
            return
        if not text.startswith("--") and text[:2] in self._option_string_actions and f"-{name}" not in self._flags():
            return  # a value behind its flag, as in -oFILE
        self.error(f"unknown option {name}{neighbours(name if name[:2] == '--' else f'-{name}', self._flags())}")

    def _flags(self) -> list[str]:
        """Return the options that are no former names."""
        return [flag for flag, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(name) for name in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"unknown command {value!r}{neighbours(value, names)}")
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(names)}{neighbours(value, names)}")

    def format_help(self) -> str:
        """Return the help: all options if they fit a screen, else the common ones."""
        text = self.format_all()
        return text if text.count("\n") <= _LINES else self._formatted(is_brief=True)

    def format_all(self) -> str:
        """Return the help with all options."""
        return self._formatted(is_brief=False)

    def _formatted(self, *, is_brief: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        sections = {group.title: group._group_actions for group in self._action_groups}
        for title, actions in (_common(sections) if is_brief else sections).items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        text = formatter.format_help() + (self.epilog or "")
        return f"{text}\nall options: {self.prog} --help-all\n" if is_brief else text


class _HelpAll(argparse._HelpAction):
    """The option `--help-all`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        """Print the help with all options, and exit."""
        parser._print_message(parser.format_all(), sys.stdout)
        parser.exit()


def _common(sections: Mapping[str | None, Sequence[argparse.Action]]) -> dict[str, list[argparse.Action]]:
    """Return the required and the common arguments, in two sections."""
    found: dict[str, list[argparse.Action]] = {"arguments": [], "options": []}
    for action in itertools.chain.from_iterable(sections.values()):
        option: Option | None = getattr(action, "option", None)
        if option is not None and (option.is_common or action.required):
            found["options" if action.option_strings else "arguments"].append(shortened(action))
    return found


def shortened(action: argparse.Action) -> argparse.Action:
    """Return an argument with the first phrase of its help, and its default if that fits the line."""
    text = action.help or ""
    first, default = _PHRASE_END.split(text)[0], _DEFAULT.search(text)
    made = copy.copy(action)
    made.help = f"{first}{default[0]}" if default and len(first + default[0]) <= _LINE else first
    return made


_LINE = 44
"""Columns of the help texts in a terminal of 80 columns."""
_PHRASE_END = re.compile(r"[;:] | \(")
"""Matches the end of the first phrase of a help text."""
_DEFAULT = re.compile(r" \(default: [^()]*\)$")
"""Matches the default at the end of a help text."""


class _Renamed(argparse.Action):
    """A hidden option under its former name: it sets the one that is now used instead, and is noted as renamed."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        """Store the value."""
        setattr(namespace, _RENAMED, [*getattr(namespace, _RENAMED, ()), (self.option_strings[0], self.dest)])
        setattr(namespace, self.dest, values)


_RENAMED = "renamed"
"""Name in the namespace of the options that were given under former names, each with its present name."""


def former_names(arguments: argparse.Namespace) -> list[str]:
    """Return a sentence for each option that was given under its former name."""
    pairs = [(flag, name.replace("_", "-")) for flag, name in getattr(arguments, _RENAMED, ())]
    return [f"{flag} is now --{name}; the old name goes in version {GONE_IN}" for flag, name in pairs]


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all commands; its result holds only the options that were given, by their names."""
    parser = _Parser(
        prog="cpd-onnx", description="Make a trained ONNX model smaller and faster, and prove the result correct."
    )
    parser.add_argument("--version", action="version", version=f"cpd-onnx {__version__}", help="show the version")
    _add_verbose(parser, default=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, owner in COMMANDS.items():
        description = (inspect.getdoc(owner) or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=_lowered(description).removesuffix("."),
            description=description,
            argument_default=argparse.SUPPRESS,
            usage=" ".join([parser.prog, name, *_required(owner), "[options]"]),
            epilog=_examples(getattr(owner, "examples", ()), parser.prog),
        )
        command.add_argument("--help-all", action=_HelpAll, help="show all options and exit")
        _add_verbose(command, default=argparse.SUPPRESS)
        groups: dict[str, Any] = {"": command}
        for named in sorted(options_of(owner), key=_rank):
            title = named.option.group
            if title not in groups:
                groups[title] = command.add_argument_group(title)
            _add(groups[title], named)
        command.set_defaults(**{_REQUEST: owner})
    return parser


def _add_verbose(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", default=default, help="show the traceback of an error")


def _required(owner: type) -> Iterator[str]:
    """Yield the required arguments of a command as its usage names them."""
    for named in sorted(options_of(owner), key=lambda named: not named.is_positional):
        if named.default is MISSING:
            word = named.option.metavar or named.name.upper()
            flag = "" if named.is_positional else f"{named.option.flag.split('/')[0] or f'--{named.key}'} "
            yield f"{flag}{word}{' …' if named.is_positional and named.option.is_many else ''}"


def _examples(lines: Sequence[str], program: str) -> str:
    """Return the section of the help that shows command lines."""
    return "".join(["\nexamples:\n", *(f"  {program} {line}\n" for line in lines)]) if lines else ""


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
        count = "+" if named.default is MISSING else "*"
        more: dict[str, Any] = {"nargs": count} if option.is_many else {}
        kinds = {"choices": option.choices} if option.choices else {"type": _typed(option.read)}
        metavar = option.metavar or named.name.upper()
        action = group.add_argument(named.name, metavar=metavar, help=help_text, **kinds, **more)
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
    typed = {name: value for name, value in vars(arguments).items() if name not in (_REQUEST, _RENAMED, "verbose")}
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
