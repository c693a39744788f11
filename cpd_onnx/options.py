"""Options: the fields of dataclasses, each with what there is to know of it.

    @dataclass(frozen=True)
    class Allocate:
        multiple: int = option(1, "Remaining widths are multiples of this number", read=positive)

The argument of the command line and its help, the key of a recipe, Olive's option and the row of docs/options.md are
made from that, as are the signatures of `compress` and its like. tyro and jsonargparse do something similar: they take
a third of a second to import, speak other flags and messages than those that scripts rely on, and know nothing of
recipes, whose paths and functions must be told from other texts.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from cpd_onnx.errors import CpdError

_KEY = "option"
_PART = "part"
_LARGEST = 2**31 - 1
"""The largest whole number that every library takes."""
_DIGITS = 4000
"""Python refuses to read numbers of more than 4300."""
T = TypeVar("T")
S = TypeVar("S")
D = TypeVar("D")
R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Option:
    """What there is to know of a field that is an option.

    Attributes:
        help: what it is for, a whole phrase without a full stop; the default is added to it.
        read: makes its value of a text, or raises ValueError; `bool` for one that is true or false.
        choices: the values that it may have, if these are few.
        flag: how it is spelled on the command line, if not like the field; " " for an argument without a name.
        metavar: what stands for its value in the help.
        group: the heading in the help that it stands under.
        takes: "file" for a path; "data" for what samples are read from, a path or a function; "function" for
            `module:function`; "profile" for a profile's name or path. A recipe is not free to say these.
        is_output: whether the path is written to.
        is_many: whether it may be repeated, and has a tuple or a mapping of values.
        is_recorded: whether a recipe has it; where things go is said anew each time.
    """

    help: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    flag: str = ""
    metavar: str | None = None
    group: str = ""
    takes: Literal["", "file", "data", "function", "profile"] = ""
    is_output: bool = False
    is_many: bool = False
    is_recorded: bool = True


@dataclass(frozen=True)
class Named:
    """An option of a request.

    Attributes:
        name: how it is called, "image_mean" for field `mean` of the part `images`.
        default: its value where nothing is said; MISSING if something must be.
        option: all else.
    """

    name: str
    default: Any
    option: Option

    @property
    def key(self) -> str:
        """Its key in a recipe, and its flag without the hyphens."""
        return self.option.flag.split("--")[-1].strip() or self.name.replace("_", "-")

    @property
    def is_positional(self) -> bool:
        """Whether it is an argument without a name."""
        return self.option.flag == " "

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false."""
        return self.option.read is bool

    def collected(self, value: Any) -> Any:
        """Its value from what was read: values of one that may be repeated are a list until then."""
        if not self.option.is_many:
            return value
        return dict(value) if isinstance(self.default, dict) else tuple(value)

    def joined(self, first: Any, then: Any) -> Any:
        """What counts of a recipe's value and one that was typed: the latter, or both where it may be repeated."""
        if first is None or then is None or not self.option.is_many:
            return first if then is None else then
        return {**first, **then} if isinstance(first, Mapping) else (*first, *then)


def option(default: Any, help: str, **more: Any) -> Any:  # as argparse calls it
    """A field that is an option, see `Option`; `MISSING` is the default of one that must be given."""
    if isinstance(default, bool):
        more["read"] = bool
    metadata = {_KEY: Option(help=help, **more)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def again(owner: type, name: str, **other: Any) -> Any:
    """The option of another dataclass once more; what is not said to be other, its default too, is as it is there."""
    named = next(entry for entry in options_of(owner) if entry.name == name)
    default = other.pop("default", named.default)
    made = replace(named.option, **other)
    return option(default, **{entry.name: getattr(made, entry.name) for entry in fields(Option)})


def part(owner: type, prefix: str) -> Any:
    """A field whose value is a dataclass of options; their names begin with the prefix."""
    return field(default_factory=owner, metadata={_PART: (owner, prefix)})


def options_of(owner: type) -> Iterator[Named]:
    """The options of a dataclass and of its parts, in order."""
    for entry in fields(owner):
        if _KEY in entry.metadata:
            yield Named(entry.name, _default(entry), entry.metadata[_KEY])
        elif _PART in entry.metadata:
            inner, prefix = entry.metadata[_PART]
            yield from (replace(named, name=f"{prefix}_{named.name}") for named in options_of(inner))


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def build(owner: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from the values of its options by name; those of its parts go there."""
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
    """The values of all options of a dataclass, by name: what `build` takes."""
    found: dict[str, Any] = {}
    for entry in fields(request):
        value = getattr(request, entry.name)
        if _PART in entry.metadata:
            found |= {f"{entry.metadata[_PART][1]}_{name}": inner for name, inner in values_of(value).items()}
        else:
            found[entry.name] = value
    return found


def picked(owner: type[T], request: Any, **other: Any) -> T:
    """A dataclass with those fields that a request has too; `other` are said otherwise."""
    names = [entry.name for entry in fields(owner) if hasattr(request, entry.name)]  # type: ignore[arg-type]
    return owner(**{name: getattr(request, name) for name in names} | other)


def neighbours(name: str, known: Iterable[str]) -> str:
    """What may have been meant by a name that is not known, to stand behind it in a message."""
    close = difflib.get_close_matches(name, list(known), cutoff=0.7)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def taking(owner: Callable[P, D]) -> Callable[[Callable[[S, D], R]], Callable[Concatenate[S, P], R]]:
    """A function of something and a dataclass becomes one that takes the fields as arguments, for people to call.

    Its signature says so. What is no field is a TypeError that names the fields that are called alike.
    """

    def decorated(function: Callable[[S, D], R]) -> Callable[Concatenate[S, P], R]:
        said = inspect.signature(function)
        first = next(iter(said.parameters.values()))
        signature = said.replace(parameters=[first, *inspect.signature(owner).parameters.values()])

        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> R:
            for name in options:
                if name not in signature.parameters:
                    close = neighbours(name, signature.parameters)
                    raise TypeError(f"{function.__qualname__} has no option {name!r}{close}")
            given = signature.bind(*arguments, **options).arguments
            return function(given.pop(first.name), owner(**given))  # type: ignore[call-arg]  # by `bind`

        called.__signature__ = signature  # type: ignore[attr-defined]  # where `inspect` looks for it
        return called

    return decorated


# Readers: the value that a text says, or a ValueError.


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal() or len(text) > _DIGITS or int(text) > _LARGEST:
        raise ValueError(f"{text!r} is not a whole number from 0 to {_LARGEST}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if natural(text) == 0:
        raise ValueError("0 is not a whole number from 1 on")
    return int(text)


def integer(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a whole number") from error


def number(text: str) -> float:
    """Any number."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def above_zero(text: str) -> float:
    """A finite number above zero."""
    if not 0 < number(text) < float("inf"):
        raise ValueError(f"{text!r} is not a number above 0")
    return float(text)


def not_negative(text: str) -> float:
    """A finite number from zero on."""
    if not 0 <= number(text) < float("inf"):
        raise ValueError(f"{text!r} is not a number from 0 on")
    return float(text)


def ratio(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= number(text) <= 1:
        raise ValueError(f"{text!r} is not a share from 0 to 1")
    return float(text)


def commas(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Reads values with commas between them."""
    return lambda text: tuple(read(entry) for entry in text.split(","))


def pair(form: str, read: Callable[[str], T], sign: str = "=") -> Callable[[str], tuple[str, T]]:
    """Reads NAME=VALUE, of which the name may hold further signs; `form` is how to write it."""

    def pair_of(text: str) -> tuple[str, T]:
        name, found, value = text.rpartition(sign)
        if not found or not name:
            raise ValueError(f"{text!r} is not {form}")
        return name, read(value)

    return pair_of


def output_pair(read: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """Reads OUTPUT=VALUE; what is wrong with it is a CpdError."""

    def pair_of(text: str) -> tuple[str, T]:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise CpdError(f"{text!r} should be OUTPUT=VALUE")
        try:
            return name, read(value)
        except ValueError as error:
            raise CpdError(f"{text!r}: {error}") from error

    return pair_of
