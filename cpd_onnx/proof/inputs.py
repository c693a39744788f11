"""Inputs for the proof, at sizes that the analysis did not use, chosen to reach every branch.

Where a model leaves sizes open, the proof runs at the smallest sizes that it accepts, with a batch of one, and at
unequal odd sizes. Boolean inputs take both values. The branches of an If and the iterations of a Loop that an input
reaches are read from onnxruntime's profile of the original; for those not reached, inputs of other magnitudes, and
constants that the graph compares with, are tried.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import NodeProto

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Array
from cpd_onnx.ops.sizes import Bindings, Size, Term
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime.draws import with_fixed_draws
from cpd_onnx.runtime.sessions import (
    Assignment,
    Feed,
    Runner,
    execute,
    fed,
    is_feasible,
    open_model,
    random_array,
    random_feed,
    symbols_of,
    working_feeds,
)
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.inference import fold_again
from cpd_onnx.shapes.values import Folded, Scope, taken_branch

_SMALL = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
"""Sizes that are tried, in order, for the smallest one that a model accepts (heuristic)."""
_BATCHES = (1, 4, 3)
"""Batch sizes of the three runs, different from those of the analysis."""
_STEPS = (1, 2, 4, 7, 8, 14, 16, 32, 64)
"""Common divisors that models require of sizes, tried in order (heuristic)."""
_MOST_FED = 1 << 24
"""Limit on the number of elements of an input that is tried (64 MB as float32)."""
_MAGNITUDES = (1e-3, 30.0, 1e4)
"""Factors on random inputs that are tried to reach a branch (heuristic); zeros, which show least, come last."""
_ALIKE = 12
"""Number of random inputs with equal samples that are tried to reach a branch (heuristic)."""
_MOST_VARIANTS = 64
"""Limit on the number of inputs that are tried to reach branches (heuristic)."""
_MOST_EXTRA = 6
"""Limit on the number of inputs that are added to the proof to reach branches (heuristic)."""
_USUAL = (3, 9, 11, 7, 13)
"""Sizes of the symbols, in order, while one of them is varied (heuristic; the last one repeats)."""
_ODD_FACTORS = (((5, 7, 9, 11, 13), (5,)), ((9, 5, 11, 7, 13), (7,)))
"""Factors of the symbols' sizes in the second and the third run (heuristic): without a common divisor, then equal."""
_VARIED = ((2, 1, 1), (3, 1, 1), (1, 2, 2), (1, 4, 4), (1, 16, 16), (1, 2, 1), (2, 1, 2))
"""Multipliers and divisors of sizes that operators seem to require, and all other sizes (heuristic)."""
_MARK = "cpd-mark"
"""Prefix of the names of marked nodes."""


@dataclass(frozen=True)
class ProofInputs:
    """Inputs of a proof.

    Attributes:
        feeds: The inputs.
        unreached: Branches and numbers of iterations that no input reaches, as (path, description): the path of the
            body that has not run, or "" if it has run.
        branches: Branches of an If that inputs reach, as (path of the body, description), with these inputs.

    """

    feeds: tuple[Feed, ...]
    unreached: tuple[tuple[str, str], ...] = ()
    branches: Mapping[tuple[str, str], tuple[Feed, ...]] = field(default_factory=dict)


def proof_inputs(
    folded: Folded, session: Runner, count: int = 2, *, given: Sequence[Feed] = (), is_large: bool = False
) -> ProofInputs:
    """Return the given inputs, and random ones at sizes that the analysis did not use: at least `count` in all.

    For a large model, branches are not observed, and accepted sizes are inferred from shapes instead of runs. Raises
    UnsupportedError with onnxruntime's first error if the model accepts no input.
    """
    random = [*_at_other_sizes(folded, None if is_large else session)]
    if is_large and random and not _runs(session, random[-1]):
        random = []
    if len(given) + len(random) < count:
        random += working_feeds(folded, session, count - len(given) - len(random))
    feeds = [*given, *(_with_flags(session, feed, number) for number, feed in enumerate(random))]
    marks = None if is_large else Marks(folded)
    if marks is None or not marks.places:
        return ProofInputs(tuple(feeds))
    return _covering(folded, session, marks, feeds)


# Sizes.


def numbers_in(folded: Folded, feed: Feed) -> dict[str, int]:
    """Return the values of a model's symbols in some inputs, by name, without those that cannot be determined."""
    known: dict[Term, tuple[int, ...]] = {}
    waiting = [pair for v in fed(folded) for pair in zip(v.sizes or (), feed[v.name].shape, strict=True)]
    for _ in waiting:
        for extent, size in waiting:
            if not isinstance(extent, Size):
                continue
            terms = {t for monomial in extent.coefficients for t, _ in monomial} - known.keys()
            if len(terms) == 1:
                term = terms.pop()
                bindings = Bindings(known | {term: (0, 1)} | {t: n * 2 for t, n in known.items()})
                low, high = (bindings.at(extent, place) for place in (0, 1))
                if low is not None and high is not None and high != low and (size - low) % (high - low) == 0:
                    known[term] = (int((size - low) // (high - low)),)
    return {str(term): numbers[0] for term, numbers in known.items()}


def feed_at(folded: Folded, assignment: Assignment, seed: int) -> Feed | None:
    """Return random inputs of the assigned sizes; None if they are too large or negative."""
    rng, bindings = np.random.default_rng(seed), Bindings({term: (n,) for term, n in assignment.items()})
    feed: Feed = {}
    for value in fed(folded):
        if value.sizes is None:
            raise UnsupportedError(f"the shape of input {value.name!r} is not known: give it with --input-shape")
        shape = [bindings.at(extent, 0) for extent in value.sizes]
        if any(size is None or size < 0 for size in shape) or math.prod(map(int, shape)) > _MOST_FED:  # type: ignore[arg-type]  # not None
            return None
        feed[value.name] = random_array(folded, value, [int(size) for size in shape], rng)  # type: ignore[arg-type]  # as above
    return feed


def beyond_solved(folded: Folded, session: Runner) -> Iterator[Feed]:
    """Yield inputs that the original accepts although open sizes are not those that its operators seem to require.

    A Reshape to fixed sizes, for example, also accepts a longer image in place of a larger batch. Each of the solved
    sizes, and then all of them, are varied by a factor, the other ones are 1 or make up for it.
    """
    named = list(folded.solved)
    for names in dict.fromkeys([*((name,) for name in named), tuple(named)]):
        for up, down, rest in _VARIED:
            sizes = {name: number * up // down if name in names else number for name, number in folded.solved.items()}
            feed = _of_named_sizes(folded, sizes, rest) if min(sizes.values()) > 0 else None
            if feed is not None and _runs(session, feed):
                yield feed


def _of_named_sizes(folded: Folded, sizes: Mapping[str, int], rest: int) -> Feed | None:
    """Return random inputs of open sizes by name, `rest` for all others; None if they are unknown or too large."""
    rng, feed = np.random.default_rng(0), dict[str, Array]()
    infos = {info.name: info for info in folded.model.graph.input}
    for value in fed(folded):
        dims = infos[value.name].type.tensor_type.shape.dim
        names = [dim.dim_param or f"{value.name}[{axis}]" for axis, dim in enumerate(dims)]
        pairs = zip(names, dims, strict=True)
        shape = [dim.dim_value if dim.dim_value > 0 else sizes.get(name, rest) for name, dim in pairs]
        if value.sizes is None or math.prod(shape) > _MOST_FED:
            return None
        feed[value.name] = random_array(folded, value, shape, rng)
    return feed


def _at_other_sizes(folded: Folded, session: Runner | None) -> Iterator[Feed]:
    """Yield up to three inputs: at the smallest sizes, and at unequal odd multiples of a common divisor.

    Without a session, accepted sizes are those that leave no shape unknown.
    """
    symbols = symbols_of(folded)
    if not symbols and not any(map(_is_number, random_feed(folded).values())):
        return
    free = [term for term, is_batch in symbols.items() if not is_batch]
    batches = [term for term, is_batch in symbols.items() if is_batch]
    least: Feed | None = None
    size = 1
    for size in _SMALL if free else (1,):
        least = _accepted(folded, session, dict.fromkeys(free, size) | dict.fromkeys(batches, _BATCHES[0]), 0)
        if least is not None:
            yield least
            break
    smallest = size if least is not None else 1
    for number, lists in enumerate(_ODD_FACTORS, start=1):
        for assignment in (each for factors in lists for each in _multiples(free, smallest, factors)):
            feed = _accepted(folded, session, assignment | dict.fromkeys(batches, _BATCHES[number]), number)
            if feed is not None:
                yield feed
                break


def _multiples(free: Sequence[Term], least: int, factors: Sequence[int]) -> Iterator[Assignment]:
    """Yield sizes above the smallest: odd multiples of a common divisor, by increasing divisor."""
    if not free:
        yield {}
        return
    for step in _STEPS:
        base = max(0, -(-least // step) - factors[0])
        base += base % 2  # sums with odd factors stay odd
        yield {term: step * (base + factors[min(number, len(factors) - 1)]) for number, term in enumerate(free)}


def _accepted(folded: Folded, session: Runner | None, assignment: Assignment, seed: int) -> Feed | None:
    """Return inputs of the assigned sizes that the original accepts, with other scalar integers if needed; or None."""
    feed = feed_at(folded, assignment, seed) if is_feasible(folded, assignment) else None
    if feed is None:
        return None
    if session is None:
        here = fold_again(folded, folded.model, {str(term): number for term, number in assignment.items()})
        return feed if here.unknown.keys() <= folded.unknown.keys() else None
    changes = _integer_changes(_compared_with(folded)) if any(_is_number(array) for array in feed.values()) else ()
    return next((f for f in (feed, *(_changed(feed, change) for change in changes)) if _runs(session, f)), None)


def _is_number(array: Array) -> bool:
    return array.size == 1 and array.dtype.kind in "iu"


def _changed(feed: Feed, change: _Change) -> Feed:
    return {name: change(array) for name, array in feed.items()}


def _with_flags(session: Runner, feed: Feed, number: int) -> Feed:
    """Return inputs with Boolean ones all true, all false or mixed, by the number of the run.

    They stay as they are if the original fails or gives NaN with these, as attention does where a mask hides all.
    """
    flagged = dict(feed)
    for name, array in feed.items():
        if array.dtype == np.bool_ and number % 3:
            mixed = np.random.default_rng(number).integers(0, 2, array.shape).astype(np.bool_)
            flagged[name] = np.zeros_like(array) if number % 3 == 1 else mixed
    is_changed = any(flagged[name] is not feed[name] for name in feed)
    return flagged if not is_changed or _runs(session, flagged) else feed


# Branches.


class Marks:
    """A copy of the original with a marked node in each body of If, Loop and Scan, to be found in a profile."""

    def __init__(self, folded: Folded) -> None:
        """Copy the model and mark its bodies."""
        self._editor = Editor(folded.model.copy())
        self.places: dict[str, _Body] = {}
        """Bodies by the mark of their node."""
        self._mark(folded.scope)

    def _mark(self, scope: Scope) -> None:
        for position, bodies in scope.bodies.items():
            node = scope.nodes[position]
            taken = taken_branch(scope.lookup(node.input[0])) if traits_of(node).branches else None
            for name, body in bodies.items():
                if body.function or (taken is not None and name != taken):
                    continue  # a function has no graph of its own; no input reaches the other branch
                self._mark_body(_body_of(scope, node, name, body), body)
                self._mark(body)

    def _mark_body(self, found: _Body, body: Scope) -> None:
        nodes = self._editor.graph(body).node
        marked = next((n for n in nodes if not traits_of(n).is_constant and any(n.output)), None)
        if marked is None:
            return  # it has no node that a profile would list
        mark = f"{_MARK}-{len(self.places)}-"
        marked.name = f"{mark}{marked.name}"
        self.places[mark] = found

    def counts(self, feeds: Sequence[Mapping[str, Array]]) -> list[Counter[str]]:
        """Return how often each mark runs, for each of some inputs that the model accepts."""
        if not feeds:
            return []
        with tempfile.TemporaryDirectory() as folder:
            session = open_model(with_fixed_draws(self._editor.model), optimise=False, profile=Path(folder) / "runs")
            for feed in feeds:
                execute(session, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
        found = [Counter[str]() for _ in feeds]
        for event in events:
            if event["cat"] == "Node" and _MARK in event["name"]:
                run = bisect.bisect_right(starts, event["ts"]) - 1
                found[run].update(mark for mark in self.places if mark in event["name"])
        return found

    def reached(self, counts: Counter[str]) -> set[str]:
        """Return descriptions of what an input reaches, from its counts."""
        return {goal for mark, body in self.places.items() for goal in body.reached(counts[mark])}

    def branches(self) -> list[tuple[str, str]]:
        """Return the branches of each If that is reachable, as (path, description)."""
        return [(path, goal) for body in self.places.values() if not body.is_loop for goal, path in body.goals.items()]

    def wanted(self) -> dict[str, str]:
        """Return descriptions of everything reachable, with the path of the body that runs only then, or ""."""
        return {goal: path for body in self.places.values() for goal, path in body.goals.items()}


@dataclass(frozen=True)
class _Body:
    """A body of an If, Loop or Scan.

    Attributes:
        what: Description: the branch of an If, or the loop.
        is_loop: Whether it may run several times.
        goals: Descriptions of what inputs may reach, with the path of the body where it runs only then, or "".

    """

    what: str
    is_loop: bool
    goals: Mapping[str, str]

    def reached(self, count: int) -> Iterator[str]:
        """Yield what is reached if the body runs `count` times."""
        if not self.is_loop:
            yield from (self.what,) * min(count, 1)
            return
        yield f"{self.what} with {'an' if count else 'no'} iteration"
        if count > 1:
            yield f"{self.what} with several iterations"


def _body_of(scope: Scope, node: NodeProto, name: str, body: Scope) -> _Body:
    label = node.name or node.output[0]
    if traits_of(node).branches:
        what = f"the {name.replace('_', ' ')} of If {label!r}"
        return _Body(what, False, {what: body.path})
    what = f"{node.op_type} {label!r}"
    low, high = _iterations(scope, node)
    goals = {f"{what} with an iteration": body.path} if high > 0 else {}
    goals |= {f"{what} with no iteration": ""} if low < 1 else {}
    goals |= {f"{what} with several iterations": ""} if high > 1 else {}
    return _Body(what, True, goals)


def _iterations(scope: Scope, node: NodeProto) -> tuple[int, float]:
    """Return the smallest and largest number of iterations of a Loop or Scan that the graph allows."""
    if traits_of(node).scans:
        return 1, math.inf  # empty axes are not tried
    count, condition = (scope.lookup(name) if name else None for name in (*node.input, "", "")[:2])
    most = int(count.value.item()) if count is not None and count.is_static and count.value is not None else math.inf
    continues = condition is None or (
        condition.is_static and condition.value is not None and bool(condition.value.item())
    )
    return (1 if continues and node.input[0] and 0 < most < math.inf else 0), most


def _covering(folded: Folded, session: Runner, marks: Marks, feeds: Sequence[Feed]) -> ProofInputs:
    """Return the inputs, and further ones that reach what these do not."""
    wanted, chosen = marks.wanted(), list(feeds)
    reached = [marks.reached(counts) for counts in marks.counts(feeds)]
    missing = set(wanted).difference(*reached)
    if missing:
        variants = [feed for feed in _variants(folded, feeds) if _runs(session, feed)]
        variants += _at_compared_sizes(folded, session)
        for feed, counts in zip(variants, marks.counts(variants), strict=True):
            gained = missing & marks.reached(counts)
            if gained and len(chosen) < len(feeds) + _MOST_EXTRA:
                chosen.append(feed)
                reached.append(marks.reached(counts))
                missing -= gained
    return ProofInputs(
        tuple(chosen),
        tuple((wanted[goal], goal) for goal in sorted(missing)),
        {
            (path, goal): tuple(feed for feed, goals in zip(chosen, reached, strict=True) if goal in goals)
            for path, goal in marks.branches()
            if goal not in missing
        },
    )


def _runs(session: Runner, feed: Feed) -> bool:
    """Return whether the original runs on some inputs with outputs free of NaN."""
    with contextlib.suppress(UnsupportedError):
        return not any(array.dtype.kind == "f" and np.isnan(array).any() for array in execute(session, feed))
    return False


def _variants(folded: Folded, feeds: Sequence[Feed]) -> Iterator[Feed]:
    """Yield inputs of other magnitudes and signs, and with numbers that the graph compares with."""
    numbers = _compared_with(folded)
    count = 0
    for feed in feeds[:2]:
        for change in (*_float_changes(numbers), *_integer_changes(numbers), *_last_changes()):
            changed = _changed(feed, change)
            if any(changed[name] is not feed[name] for name in feed):
                count += 1
                yield changed
            if count >= _MOST_VARIANTS:
                return


def _at_compared_sizes(folded: Folded, session: Runner) -> Iterator[Feed]:
    """Yield inputs at sizes near constants that the graph compares with, or twice or four times these, by symbol."""
    symbols = symbols_of(folded)
    usual = {term: _USUAL[min(place, len(_USUAL) - 1)] for place, term in enumerate(symbols)}
    numbers = sorted({int(n) for n in _compared_with(folded) if 0 < n < _SMALL[-1] and n == int(n)})
    wanted = sorted({size for n in numbers for size in (n - 1, n, n + 1, 2 * n - 1, 2 * n, 4 * n) if size > 0})
    for count, (term, size) in enumerate(itertools.product(symbols, wanted)):
        feed = _accepted(folded, session, usual | {term: size}, count) if count < _MOST_VARIANTS else None
        if feed is not None:
            yield feed


def _float_changes(numbers: Sequence[float]) -> Iterator[_Change]:
    for factor in (*_MAGNITUDES, *(abs(n) * f for n in numbers if n for f in (10.0, 0.1))):
        yield _Change("f", lambda array, factor=factor: array * factor)
    yield _Change("f", lambda array: np.abs(array))
    yield _Change("f", lambda array: -np.abs(array))


def _last_changes() -> Iterator[_Change]:
    for seed in range(_ALIKE):
        yield _Change("f", lambda array, seed=seed: _alike(array, seed))
    yield _Change("f", lambda array: array * 0.0)


def _alike(array: Array, seed: int) -> Array:
    """Return random numbers that are the same for all indices of the first axis."""
    return np.broadcast_to(np.random.default_rng(seed).standard_normal(array.shape[1:]), array.shape)


def _integer_changes(numbers: Sequence[float]) -> Iterator[_Change]:
    whole = sorted({int(n) + d for n in numbers if abs(n) < 2**31 and n == int(n) for d in (0, 1, -1)} | {0, 1, 3})
    for number in whole:
        yield _Change("iu", lambda array, number=number: np.full_like(array, number) if array.size == 1 else array)
    for number in (False, True):
        yield _Change("b", lambda array, number=number: np.full_like(array, number))


@dataclass(frozen=True)
class _Change:
    """A change of the inputs with dtypes of some kinds (`numpy.dtype.kind`)."""

    kinds: str
    function: Callable[..., Array]

    def __call__(self, array: Array) -> Array:
        """Return the changed input, or the same array if its dtype is of another kind or cannot hold the result."""
        if array.dtype.kind not in self.kinds:
            return array
        with np.errstate(all="ignore"), contextlib.suppress(OverflowError, ValueError):
            changed = self.function(array)
            return changed if changed is array else np.asarray(changed).astype(array.dtype)
        return array


def _compared_with(folded: Folded) -> list[float]:
    """Return the scalar constants that nodes compare with, in order."""
    found: set[float] = set()
    for scope in folded.scope.walk():
        for node in scope.nodes:
            for name in node.input if traits_of(node).compares else ():
                value = scope.lookup(name)
                if value is not None and value.is_static and value.value is not None and value.value.size == 1:
                    number = float(value.value.item())
                    if math.isfinite(number):
                        found.add(number)
    return sorted(found)
