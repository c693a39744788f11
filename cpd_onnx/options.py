"""Options: fields of dataclasses, each with a description from which every interface is generated.

    @dataclass(frozen=True)
    class Allocate:
        round_to: int = option(1, "Remaining widths are multiples of this number", read=positive)

The command-line argument and its help, the recipe key, the Olive option and the row of docs/options.md are generated
from it, as are the signatures of `compress` and similar functions. tyro and jsonargparse do something similar, but take
a third of a second to import, use other flags and messages than those that scripts rely on, and do not support recipes,
which must distinguish paths and functions from other text.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from cpd_onnx.errors import CpdError
from cpd_onnx.moved import GONE_IN

_KEY = "option"
RENAMED_FROM = "renamed_from"
"""Key in the metadata of a field that is no option, for its former name."""
_PART = "part"
_LARGEST = 2**31 - 1
"""Largest integer that every library accepts: that of 32 bits, with sign."""
_DIGITS = 4000
"""Number of digits up to which integers are read; Python refuses more than 4300."""
T = TypeVar("T")
S = TypeVar("S")
D = TypeVar("D")
R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Option:
    """The description of a field that is an option.

    Attributes:
        help: Purpose of the option, as a whole phrase without a full stop; the default is appended in the help.
        read: Function that converts text to a value or raises ValueError; `bool` for a switch.
        choices: Allowed values; None if they cannot be listed.
        flag: Spelling on the command line; empty if it follows from the field's name, " " for a positional argument.
        metavar: Placeholder of the value in the help; None for that of argparse.
        group: Heading in the help; empty for the general options.
        takes: "file" for a path; "data" for a source of samples, which is a path or a function; "function" for
            `module:function`; "profile" for the name or path of a profile; "provider" for an execution provider, whose
            options may name folders. Recipes may use these only if trusted.
        is_output: Whether the path is written to.
        is_many: Whether the option may be repeated; its value is then a tuple or a mapping.
        is_recorded: Whether recipes contain it; paths of outputs are given anew for each run.
        is_common: Whether `--help` shows it where all options would not fit a screen; required ones are always shown.
        suggested: Values that shells complete, besides files.
        suffixes: Endings of the names of files that shells complete; empty for all files.
        renamed_from: Former name of the field, which is accepted until version `GONE_IN`; empty if it has always had
            this one.
    """

    help: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    flag: str = ""
    metavar: str | None = None
    group: str = ""
    takes: Literal["", "file", "data", "function", "profile", "provider"] = ""
    is_output: bool = False
    is_many: bool = False
    is_recorded: bool = True
    is_common: bool = False
    suggested: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    renamed_from: str = ""


@dataclass(frozen=True)
class Named:
    """An option of a request.

    Attributes:
        name: Name of the option, such as "image_mean" for field `mean` of the part `images`.
        default: Value if the option is not given; MISSING for a required option.
        option: Description of the option.
    """

    name: str
    default: Any
    option: Option

    @property
    def key(self) -> str:
        """Key in a recipe, which is the flag without its leading hyphens."""
        return self.option.flag.split("--")[-1].strip() or self.name.replace("_", "-")

    @property
    def former_key(self) -> str:
        """The key that it had under its former name; empty if it was not renamed."""
        return self.option.renamed_from.replace("_", "-")

    @property
    def is_positional(self) -> bool:
        """Whether it is a positional argument."""
        return self.option.flag == " "

    @property
    def is_switch(self) -> bool:
        """Whether the value is true or false."""
        return self.option.read is bool

    def collected(self, value: Any) -> Any:
        """Return the value of the field from what was read, which is a list for an option that may be repeated."""
        if not self.option.is_many:
            return value
        return dict(value) if isinstance(self.default, dict) else tuple(value)

    def joined(self, first: Any, then: Any) -> Any:
        """Return the second of two values, or both for an option that may be repeated; None stands for no value."""
        if first is None or then is None or not self.option.is_many:
            return first if then is None else then
        return {**first, **then} if isinstance(first, Mapping) else (*first, *then)


def option(default: Any, help: str, **more: Any) -> Any:  # as argparse calls it
    """Return a field that is an option, see `Option`; `MISSING` is the default of a required one."""
    if isinstance(default, bool):
        more["read"] = bool
    metadata = {_KEY: Option(help=help, **more)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def same_option(owner: type, name: str, **other: Any) -> Any:
    """Return a copy of the option of another dataclass, with `other` (and the default) replaced."""
    named = next(entry for entry in options_of(owner) if entry.name == name)
    default = other.pop("default", named.default)
    copy = replace(named.option, **other)
    return option(default, **{entry.name: getattr(copy, entry.name) for entry in fields(Option)})


def part(owner: type, prefix: str) -> Any:
    """Return a field whose value is a dataclass of options, whose names get the prefix."""
    return field(default_factory=owner, metadata={_PART: (owner, prefix)})


def options_of(owner: type) -> Iterator[Named]:
    """Yield the options of a dataclass and of its parts, in order."""
    for entry in fields(owner):
        if _KEY in entry.metadata:
            yield Named(entry.name, _default(entry), entry.metadata[_KEY])
        elif _PART in entry.metadata:
            inner, prefix = entry.metadata[_PART]
            yield from (replace(named, name=f"{prefix}_{named.name}") for named in options_of(inner))


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


class Renaming(type):
    """Metaclass of dataclasses with renamed fields: their former names are accepted, with a DeprecationWarning.

    It covers calls (`Allocate(spread="global")`) and the attributes of instances (`budget.spread`).
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        """Create a class whose instances have the former names of their fields as attributes."""
        super().__init__(name, bases, namespace)
        cls.__getattr__ = _former_attribute

    def __call__(cls, *args: Any, **values: Any) -> Any:
        """Create an instance, with the values under the present names of their fields."""
        return super().__call__(*args, **_renamed(cls, values))

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of `__init__` without `self`, which `inspect` would not find behind `__call__`."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]  # that of this very class
        return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.cache
def former_names(owner: type) -> dict[str, str]:
    """Return the present names of renamed fields by their former ones."""
    found = {}
    for entry in fields(owner):
        option = entry.metadata.get(_KEY)
        old = option.renamed_from if option else entry.metadata.get(RENAMED_FROM)
        if old:
            found[old] = entry.name
    return found


def _renamed(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of fields by present names; raises TypeError if one is given under both."""
    renamed = dict(values)
    for old, new in former_names(owner).items() if values else ():
        if old not in renamed:
            continue
        if new in renamed:
            raise TypeError(f"{old!r} is the former name of {new!r}: give only {new!r}")
        _warn_of(old, new, 4)
        renamed[new] = renamed.pop(old)
    return renamed


def _former_attribute(self: Any, name: str) -> Any:
    """Return the value of a field by its former name (called only for attributes that do not exist)."""
    owner: type = type(self)
    new = former_names(owner).get(name)
    if new is None:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {name!r}")
    _warn_of(name, new, 3)
    return getattr(self, new)


def _warn_of(old: str, new: str, depth: int) -> None:
    text = f"{old!r} is now called {new!r}; the old name no longer works in version {GONE_IN}"
    warnings.warn(text, DeprecationWarning, stacklevel=depth)


def build(owner: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of a dataclass from the values of its options, and of those of its parts, by name."""
    given: dict[str, Any] = {}
    for entry in fields(owner):  # type: ignore[arg-type]  # a dataclass
        if _PART in entry.metadata:
            inner, prefix = entry.metadata[_PART]
            names = {named.name for named in options_of(inner)}
            given[entry.name] = build(
                inner, {name: values[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in values}
            )
        elif entry.name in values:
            given[entry.name] = values[entry.name]
    return owner(**given)


def values_of(request: Any) -> dict[str, Any]:
    """Return the values of all options of an instance by name, the inverse of `build`."""
    found: dict[str, Any] = {}
    for entry in fields(request):
        value = getattr(request, entry.name)
        if _PART in entry.metadata:
            found |= {f"{entry.metadata[_PART][1]}_{name}": inner for name, inner in values_of(value).items()}
        else:
            found[entry.name] = value
    return found


def options_from(owner: type[T], request: Any, **other: Any) -> T:
    """Return an instance of a dataclass with the values of the fields that a request shares, and `other` replaced."""
    names = [entry.name for entry in fields(owner) if hasattr(request, entry.name)]  # type: ignore[arg-type]
    return owner(**{name: getattr(request, name) for name in names} | other)


def neighbours(name: str, known: Iterable[str]) -> str:
    """Return a suggestion of similar names to append to a message about an unknown name; empty if there are none."""
    close = difflib.get_close_matches(name, list(known), cutoff=0.7)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def taking(owner: Callable[P, D]) -> Callable[[Callable[[S, D], R]], Callable[Concatenate[S, P], R]]:
    """Return a decorator for functions of a subject and a dataclass, which makes them take the fields as arguments.

    The signature of the function lists the fields. An argument that is not a field is a TypeError that names similar
    fields.
    """

    def decorated(function: Callable[[S, D], R]) -> Callable[Concatenate[S, P], R]:
        original = inspect.signature(function)
        first = next(iter(original.parameters.values()))
        signature = original.replace(parameters=[first, *inspect.signature(owner).parameters.values()])

        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> R:
            options = _renamed(owner, options)  # type: ignore[arg-type]  # a dataclass
            for name in options:
                if name not in signature.parameters:
                    close = neighbours(name, signature.parameters)
                    raise TypeError(f"{function.__qualname__} has no option {name!r}{close}")
            given = signature.bind(*arguments, **options).arguments
            return function(given.pop(first.name), owner(**given))  # type: ignore[call-arg]  # by `bind`

        called.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect.signature
        return called

    return decorated


# Readers: each returns the value of a text, or raises ValueError.


def natural(text: str) -> int:
    """Return an integer of at least 0."""
    if not text.isdecimal() or len(text) > _DIGITS or int(text) > _LARGEST:
        raise ValueError(f"{text!r} is not a whole number from 0 to {_LARGEST}")
    return int(text)


def positive(text: str) -> int:
    """Return an integer of at least 1."""
    if natural(text) == 0:
        raise ValueError("0 is not a whole number of at least 1")
    return int(text)


def integer(text: str) -> int:
    """Return an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a whole number") from error


def number(text: str) -> float:
    """Return a number, which may be infinite or NaN."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def above_zero(text: str) -> float:
    """Return a finite number greater than 0."""
    if not 0 < number(text) < float("inf"):
        raise ValueError(f"{text!r} is not a number greater than 0")
    return float(text)


def not_negative(text: str) -> float:
    """Return a finite number of at least 0."""
    if not 0 <= number(text) < float("inf"):
        raise ValueError(f"{text!r} is not a number of at least 0")
    return float(text)


def ratio(text: str) -> float:
    """Return a number from 0 to 1."""
    if not 0 <= number(text) <= 1:
        raise ValueError(f"{text!r} is not a ratio from 0 to 1")
    return float(text)


def share(text: str) -> float:
    """Return a number above 0 and up to 1."""
    if not 0 < number(text) <= 1:
        raise ValueError(f"{text!r} is not a fraction above 0 and up to 1")
    return float(text)


def commas(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return a reader of values separated by commas."""
    return lambda text: tuple(read(entry) for entry in text.split(","))


def pair(form: str, read: Callable[[str], T], sign: str = "=") -> Callable[[str], tuple[str, T]]:
    """Return a reader of NAME=VALUE, split at the last sign; `form` is the expected syntax, for messages."""

    def pair_of(text: str) -> tuple[str, T]:
        name, found, value = text.rpartition(sign)
        if not found or not name:
            raise ValueError(f"{text!r} is not {form}")
        return name, read(value)

    return pair_of


def output_pair(read: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """Return a reader of OUTPUT=VALUE, which raises CpdError for invalid text."""

    def pair_of(text: str) -> tuple[str, T]:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise CpdError(f"{text!r} must be OUTPUT=VALUE")
        try:
            return name, read(value)
        except ValueError as error:
            raise CpdError(f"{text!r}: {error}") from error

    return pair_of
