"""The registry of operators: one small function for each, looked up by (domain, operator).

A function takes the node's inputs as positional arguments (an omitted one is None) and its attributes as keyword
arguments. Keyword-only parameters with these names are not attributes; the importer supplies them:

* `opset`: the version of the operator set that the model imports, for behaviour that changed;
* `outputs`: how many outputs the node lists;
* `like`: a tensor on the device to create new tensors on, or None;
* `input_type`: the torch type of the node's first input;
* `masked`: whether the node's first input comes from an operator that can add a mask to it.

Whether a function returns one tensor or several follows from its return annotation (`Tensor`, or a tuple or list).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, get_args, get_origin, get_type_hints

from torch import nn
from typing_extensions import Unpack

from cpd_onnx.ops.traits import DEFAULT_DOMAINS

Function = TypeVar("Function", bound=Callable[..., Any])
Key = tuple[str, str]

RESERVED = frozenset({"opset", "outputs", "like", "input_type", "masked"})


@dataclass(frozen=True)
class Operator:
    """The implementation of one ONNX operator in torch.

    Attributes:
        function: Function that computes it.
        host: Inputs that are shapes, axes or counts; passed as flat tuples of Python numbers.
        frozen: Inputs that are never trained (statistics, quantisation scales, bounds).
        weights: Inputs that are trained even if they have a single element, such as the slope of PRelu.
        live: Creates, from the attributes, the module that replaces the function if statistics are trained.
        attributes: Attributes that the function takes.
        reserved: Reserved parameters that the function takes.
        many: Whether it returns a tuple or list of tensors.
    """

    function: Callable[..., Any]
    host: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    live: Callable[[Mapping[str, Any]], nn.Module] | None = None
    attributes: frozenset[str] = frozenset()
    reserved: frozenset[str] = frozenset()
    many: bool = False


class Options(TypedDict, total=False):
    """Options of an operator; see `Operator`."""

    host: tuple[int, ...]
    frozen: tuple[int, ...]
    weights: tuple[int, ...]
    live: Callable[[Mapping[str, Any]], nn.Module]


OPERATORS: dict[Key, Operator] = {}


def register(name: str, function: Callable[..., Any], *, domain: str = "", **options: Unpack[Options]) -> None:
    """Register a function for an operator.

    Raises:
        ValueError: The operator is already registered.
    """
    key = (domain, name)
    if key in OPERATORS:
        raise ValueError(f"operator {name} of domain {domain!r} is registered twice")
    keywords, many = _signature(function)
    OPERATORS[key] = Operator(
        function, attributes=keywords - RESERVED, reserved=keywords & RESERVED, many=many, **options
    )


def operator(*names: str, domain: str = "", **options: Unpack[Options]) -> Callable[[Function], Function]:
    """Register the decorated function for the operators of these names; see `Operator` for the options."""

    def decorate(function: Function) -> Function:
        for name in names:
            register(name, function, domain=domain, **options)
        return function

    return decorate


def family(functions: Mapping[str, Callable[..., Any]], *, domain: str = "", **options: Unpack[Options]) -> None:
    """Register functions without options, such as `{"Relu": torch.relu}`."""
    for name, function in functions.items():
        register(name, function, domain=domain, **options)


def find(domain: str, name: str) -> Operator | None:
    """Return an operator; None if it is not registered. Both spellings of the default domain are equivalent."""
    return OPERATORS.get(("" if domain in DEFAULT_DOMAINS else domain, name))


def _signature(function: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """Return the keyword-only parameters, including those of an unpacked TypedDict, and whether it returns several."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # torch's own functions in C++ have no signature; they are registered without attributes
        return frozenset(), False
    hints = get_type_hints(function)
    names = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            (options,) = get_args(hints[name])
            names |= set(get_type_hints(options))
    return frozenset(names), get_origin(hints.get("return")) in (tuple, list)
