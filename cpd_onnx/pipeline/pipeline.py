"""Pipelines: sequences of passes, as objects or as text.

>>> parse("comb, score{kind='l1'}, allocate{macs=0.5}")
[('comb', {}), ('score', {'kind': 'l1'}), ('allocate', {'macs': 0.5})]
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from types import ModuleType
from typing import Any, ClassVar, Protocol, TypeAlias

from cpd_onnx.data.open import Data, source_of
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.io.progress import ProgressObserver, announce, reporting
from cpd_onnx.io.progress import step as reported
from cpd_onnx.ir.model import ModelSource, load, translate_errors
from cpd_onnx.options import former_names, neighbours
from cpd_onnx.pipeline.state import State

PASSES = (
    "fold",
    "comb",
    "score",
    "sensitivity",
    "allocate",
    "lossless",
    "prune",
    "verify",
    "repair",
    "iterate",
    "distill",
    "interleave",
)
"""Names of the passes; pass `x` is class `X` of `cpd_onnx.passes.x`."""

_STEP = re.compile(r"\s*([a-z_]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


class Pass(Protocol):
    """A step of a pipeline: a frozen dataclass whose fields are its options.

    The class variables `requires` and `provides`, tuples of attributes of `State`, name what the pass needs and what it
    fills in. Both are optional: a pass without `provides` may fill in anything.
    """

    name: ClassVar[str]

    def __call__(self, state: State) -> State:
        """Return the state after this pass."""


Observer: TypeAlias = Callable[[str, str], None]
"""Called with the name of a pass and "start" or "end"."""


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of the passes in a text; raises ValueError, which names the position of an error."""
    steps, position = [], 0
    while position < len(text.rstrip().rstrip(",")):
        found = _STEP.match(text, position)
        if not found:
            raise ValueError(
                f"not a pipeline from {text[position : position + 20]!r} on: write name{{option=value, …}}, …"
            )
        steps.append((found[1], _options(found[2] or "")))
        position = found.end()
    return steps


def _options(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("options are name=value")
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"options {text!r} are not name=value, …: {error}") from error


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """Return a pass by name; raises ValueError for an unknown pass or option."""
    if name not in PASSES:
        raise ValueError(f"unknown pass {name!r}{neighbours(name, PASSES)}: choose one of {', '.join(PASSES)}")
    cls = getattr(_module(name), name.capitalize())
    known = [field.name for field in fields(cls)]
    former = former_names(cls)
    for option in options:
        if option not in known and option not in former:
            close = neighbours(option, known)
            raise ValueError(f"pass {name!r} has no option {option!r}{close}: it has {', '.join(known) or 'none'}")
    result: Pass = cls(**options)
    return result


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"cpd_onnx.passes.{name}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError(f"pass {name!r} needs torch: pip install 'cpd-onnx[torch]'") from error


def run(
    passes: str | Iterable[Pass],
    source: ModelSource | State,
    *,
    data: Data | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    observer: Observer | None = None,
    progress: ProgressObserver | None = None,
) -> State:
    """Run passes, given as text or as objects, on a model, and return the state after the last.

    `data` is what `data.open.source_of` takes: a path, arrays by input name, feeds, a function, or a source. `observer`
    is called at the start and end of each pass, `progress` also during the passes, see `ProgressEvent`.

    Raises ValueError for passes in an order that cannot work, before the model is opened, and CpdError for errors in
    the model or the options.
    """
    steps = [make(name, options) for name, options in parse(passes)] if isinstance(passes, str) else list(passes)
    _require_order(steps, _filled_in(source, data))
    state = source if isinstance(source, State) else _begun(source, input_shapes)
    if data is not None:
        state = replace(state, data=source_of(data, state.original, state.input_shapes))
    with reporting(progress):
        announce(*(step.name for step in steps))
        for step in steps:
            if observer:
                observer(step.name, "start")
            with translate_errors(state.original), reported(step.name):
                state = step(state)
            if observer:
                observer(step.name, "end")
    return state


def _begun(source: ModelSource, input_shapes: Mapping[str, Sequence[int]] | None) -> State:
    model = load(source)
    return State(model, model, dict(input_shapes or {}))


def _filled_in(source: ModelSource | State, data: Data | None) -> set[str]:
    """Return the attributes of the state that are set before any pass."""
    if isinstance(source, State):
        names = {field.name for field in fields(State) if getattr(source, field.name) is not None}
    else:
        names = {field.name for field in fields(State) if field.default is not None}
    return names if data is None else names | {"data"}


def _requires(step: Any) -> tuple[str, ...]:
    return getattr(step, "requires", ())


def _provides(step: Any) -> tuple[str, ...]:
    return getattr(step, "provides", ())


def _require_order(steps: Sequence[Pass], there: set[str]) -> None:
    """Raise ValueError if a pass requires an attribute that is neither set nor provided by the passes before it."""
    known = set(there)
    for step in steps:
        missing = next((name for name in _requires(step) if name not in known), None)
        if missing is not None:
            raise ValueError(_remedy(steps, there, step, missing))
        if not hasattr(step, "provides"):
            return  # it may fill in anything; `State.need` checks later
        known.update(_provides(step))


def _remedy(steps: Sequence[Pass], there: set[str], step: Pass, missing: str) -> str:
    """Return a message with what a pass is missing, and an order that works, with the passes that have to be added."""
    order: list[Any] = []
    left: list[Any] = list(steps)
    while left:
        known = there.union(*map(_provides, order))
        ready = next((each for each in left if known.issuperset(_requires(each))), None)
        added = _to_be_added(left, known) if ready is None else None
        if ready is not None:
            left.remove(ready)
            order.append(ready)
        elif added is not None:
            left.insert(0, added)
        else:
            return f"pass {step.name!r} needs {missing!r}, which no pass provides"
    maker = next(each.name for each in order if missing in _provides(each))
    names = ", ".join(each.name for each in order)
    return f"run the pass {maker!r} first: it makes {missing!r}, which {step.name!r} needs; in order: {names}"


def _to_be_added(left: Sequence[Any], known: set[str]) -> Any:
    """Return the first of `PASSES` that provides an attribute which a remaining pass lacks and no other provides."""
    for each in left:
        provided = known.union(*(_provides(other) for other in left if other is not each))
        makers = (_usual_maker(name) for name in _requires(each) if name not in provided)
        if (found := next(filter(None, makers), None)) is not None:
            return found
    return None


def _usual_maker(attribute: str) -> Any:
    for name in PASSES:
        with contextlib.suppress(UnsupportedError):  # without torch
            cls = getattr(_module(name), name.capitalize())
            if attribute in cls.provides:
                return cls
    return None
