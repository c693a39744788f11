"""Runs of a model that visit inner tensors batch by batch, so that few activations are in memory at any time.

Only the tensors at one cut of the graph are held for all batches; everything behind it is computed again whenever it is
looked at. Batches run on several threads and, within `shards.sharing`, in several processes. What they yield comes in
their order: sums over it do not depend on the number of threads and processes.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, TypeVar

import numpy as np
import onnxruntime as ort

from cpd_onnx.ir.interface import interface_of
from cpd_onnx.ir.model import Array, Lazy, Model
from cpd_onnx.runtime.draws import with_fixed_draws
from cpd_onnx.runtime.sessions import Feed, execute, open_model, sample_count
from cpd_onnx.runtime.shards import Divided
from cpd_onnx.runtime.stepwise import Parts, in_file
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Folded, Value

T = TypeVar("T")

HELD_BYTES = 256 << 20
"""Number of bytes up to which a cut is held in memory (heuristic)."""
BATCH_BYTES = 16 << 20
"""Maximum number of bytes of the largest tensor of a batch (heuristic)."""
_MOST_LOOKS = 8
"""Number of looks after which a cut is held in files rather than computed again for each (heuristic)."""
_PAGES = 1 << 16
"""Size in bytes from which an array is held in pages of its own (heuristic)."""
_ITEM = 4
"""Number of bytes of an element, where that is estimated."""


def apart(array: Array) -> Array:
    """Return an array in memory pages of its own.

    What is held for long between short-lived arrays on the heap keeps the heap from shrinking.
    """
    if array.nbytes < _PAGES:
        return array
    copied = np.frombuffer(_pages(array.nbytes), array.dtype).reshape(array.shape)
    copied[...] = array
    return copied


def _pages(size: int) -> mmap.mmap:
    """Return that many bytes of memory; where the system can, its pages are made at once, which takes half the time."""
    if not hasattr(mmap, "MAP_POPULATE"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def held_feeds(feeds: Iterable[Feed]) -> list[Feed]:
    """Return inputs of all batches, which are held until the last run has read them."""
    return [{name: apart(array) for name, array in feed.items()} for feed in feeds]


def batch_size(folded: Folded, most: int) -> int:
    """Return the number of samples in a batch, at most `most`, whose largest tensor takes `BATCH_BYTES` or less."""
    sizes = [_bytes(folded, value, 1) for value in folded.scope.values.values() if value.constants is None]
    largest = max((size for size in sizes if math.isfinite(size)), default=0.0)
    return max(1, min(most, int(BATCH_BYTES / max(1.0, largest))))


def _bytes(folded: Folded, value: Value | None, samples: int) -> float:
    """Return the approximate number of bytes of a tensor for some samples; infinity if that is not known."""
    if value is None or value.shape is None:
        return math.inf
    batched = bool(value.shape) and not value.has_fixed(0)
    return _ITEM * math.prod(value.shape) * (samples / max(1, folded.batch) if batched else 1.0)


@dataclass(frozen=True)
class Stop:
    """A place in the graph where tensors are looked at.

    Attributes:
        position: Position of the last node that runs before.
        names: Tensors that are looked at.
    """

    position: int
    names: tuple[str, ...]


Tensors: TypeAlias = Mapping[str, Array]
"""Tensors of one batch by name, which must not be modified."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of the model before a stop: None if what is looked at is there already."""

    session: ort.InferenceSession | None
    inputs: list[str]
    outputs: list[str]
    needed: frozenset[str]


class Stream:
    """A run of a model on all batches, of which the tensors at one cut are held by the process that runs the batch.

    Weights are read whenever their piece runs. A copy of a model with the same nodes (a pruned one) can be run in the
    same way as the original.
    """

    def __init__(self, folded: Folded, model: Model, feeds: Sequence[Feed], held_out: int = 0) -> None:
        """Start with the cut before the first node.

        Args:
            folded: The original, which determines the order of nodes.
            model: The original or a copy with other weights and sizes.
            feeds: Inputs, one dictionary for each batch.
            held_out: Number of the last batches, which are looked at apart from the others.
        """
        self._folded, self._parts = folded, Parts(folded, model)
        self._batches = Divided.among(range(len(feeds)), held_out)
        taken = self._batches.map(lambda batch: interface_of(model).taken(feeds[batch]))
        self._held = [{} if held is None else held for held in taken.items]
        self.sizes = [sample_count(feed) for feed in feeds]
        self._done = 0
        self._producers = folded.scope.producers
        self._fed = list(feeds[0])

    def alive(self, position: int) -> tuple[str, ...]:
        """Return the tensors that are computed up to and including a position and needed after it."""
        makers = self._producers
        return tuple(
            name
            for name, last in self._parts.last.items()
            if last > position
            and (name in self._fed or (name in makers and makers[name] <= position))
            and not (name in makers and self._parts.is_constant[makers[name]])
        )

    def keep_alive(self, needed: Mapping[str, int]) -> None:
        """Let tensors be needed up to a position, even if no node takes them there."""
        for name, position in needed.items():
            self._parts.last[name] = max(self._parts.last.get(name, -1), position)

    def cut_bytes(self, position: int) -> float:
        """Return the approximate number of bytes of the tensors alive after a position, in all batches."""
        values, samples = self._folded.scope.values, sum(self.sizes)
        return sum(_bytes(self._folded, values.get(name), samples) for name in self.alive(position))

    def is_computed(self, name: str) -> bool:
        """Return whether a tensor is computed by a node, and not from weights alone."""
        maker = self._producers.get(name)
        return maker is not None and not self._parts.is_constant[maker]

    def of(self, model: Model) -> Stream:
        """Return a run of a copy of the model with the same nodes that continues from the held cut.

        The copy must not differ from the model before the cut, see `first_difference`.
        """
        other = copy.copy(self)
        other._held, other._parts = list(self._held), Parts(self._folded, model)
        if self._done == 0:  # inputs may have lost channels
            other._held = [interface_of(model).taken(held) for held in self._held]
        other.keep_alive(self._parts.last)
        return other

    def move(self, most: int, limit: float) -> None:
        """Move the held cut as far as possible, up to the position `most`, so that up to `limit` bytes are held."""
        places = range(most, self._done - 1, -1)
        cut = next((place for place in places if self.cut_bytes(place) <= limit), None)
        if cut is not None:
            self.looks([], lambda *_: None, cut=cut)

    def run(self, stops: Sequence[Stop], look: Callable[[int, int, Tensors], T]) -> list[tuple[T, ...]]:
        """Return the results of looks at tensors, for each batch in order one for each stop.

        Args:
            stops: Where to look, in the order of the graph.
            look: Called with the number of the stop, that of the batch, and the tensors; from several threads.

        Raises UnsupportedError if onnxruntime cannot run a piece.
        """
        return self._batches.each(self._through(stops, look, None))

    def total(
        self, stops: Sequence[Stop], look: Callable[[int, int, Tensors], T], batches: slice = slice(None)
    ) -> tuple[T, ...]:
        """Return the sums of such results over some batches, see `Divided.total`, one for each stop."""
        return self._batches[batches].total(self._through(stops, look, None))

    def looks(
        self, stops: Sequence[Stop], look: Callable[[int, int, Tensors], T], *, cut: int | None = None
    ) -> Divided[tuple[T, ...]]:
        """Return such results for each batch in the process that runs it.

        `cut` is the position of the cut that replaces the held one as batches pass it; before the first stop.
        """
        found = self._batches.map(self._through(stops, look, cut))
        if cut is not None and cut >= self._done:
            self._done = cut + 1
        return found

    def _through(
        self, stops: Sequence[Stop], look: Callable[[int, int, Tensors], T], cut: int | None
    ) -> Callable[[int], tuple[T, ...]]:
        """Return a function that takes one batch through all stops."""
        moves = cut is not None and cut >= self._done
        if cut is not None and moves:
            stops = [Stop(cut, self.alive(cut)), *stops]
        pieces = self._pieces(stops)
        hold = in_file if cut is not None and self.cut_bytes(cut) > HELD_BYTES else apart

        def through(batch: int) -> tuple[T, ...]:
            before = tensors = self._held[batch]
            found = list[T]()
            for number, (stop, piece) in enumerate(zip(stops, pieces, strict=True)):
                if piece.session is not None:
                    given = execute(piece.session, {name: tensors[name] for name in piece.inputs})
                    tensors = tensors | dict(zip(piece.outputs, given, strict=True))
                if moves and number == 0:
                    own = {name: tensors[name] for name in stop.names}
                    tensors = {name: a if a is before.get(name) else hold(a) for name, a in own.items()}
                    self._held[batch] = tensors
                else:
                    found.append(look(number - moves, batch, tensors))
                tensors = {name: array for name, array in tensors.items() if name in piece.needed}
            return tuple(found)

        return through

    def _pieces(self, stops: Sequence[Stop]) -> list[_Piece]:
        """Return the piece before each stop, which computes what is looked at there and what later pieces need."""
        found: list[_Piece] = []
        needed: set[str] = set()
        starts = [self._done, *(stop.position + 1 for stop in stops[:-1])]
        for stop, start in reversed(list(zip(stops, starts, strict=True))):
            later = frozenset(needed)
            wanted = dict.fromkeys([*stop.names, *sorted(needed)])
            outputs = [name for name in wanted if self._producers.get(name, -1) >= start]
            needed = set(wanted) - set(outputs)
            if not outputs:
                found.append(_Piece(None, [], [], later))
                continue
            part, inputs, _ = self._parts.make(outputs, start)
            needed |= set(inputs)
            session = open_model(with_fixed_draws(part), optimise=not self._parts.is_half, threads=1)
            found.append(_Piece(session, inputs, outputs, later))
        return found[::-1]


def cuts_before(positions: Sequence[int], stream: Stream) -> dict[int, int]:
    """Return where the held cut is moved so that little is held and little computed again.

    Args:
        positions: Positions of nodes whose inputs are looked at, in the order of the graph.
        stream: A run before its first node.

    Returns the positions of cuts by the number of the look before which they are reached: the smallest cut since the
    node before, if it fits in memory; else the smallest one for some looks.
    """
    smallest = [(stream.cut_bytes(-1), 0)]
    for before, position in pairwise(positions):
        sizes = [(stream.cut_bytes(place), -place) for place in range(before, position)]
        smallest.append(min(sizes, default=(math.inf, 0)))
    found: dict[int, int] = {}
    last = 0
    for number, (size, place) in enumerate(smallest):
        if number and size <= HELD_BYTES:
            found[number], last = -place, number
        elif number - last >= _MOST_LOOKS:
            last = min(range(last + 1, number + 1), key=lambda each: (smallest[each][0], -each))
            found[last] = -smallest[last][1]
    return found


def first_difference(folded: Folded, model: Model) -> int:
    """Return the position of the first node of which a copy of a model computes something else, or their number.

    It is the first of all if inputs have lost channels.

    Args:
        folded: The model.
        model: A copy with the same nodes, in which weights and operands may have other sizes or values.
    """
    if interface_of(model).kept != interface_of(folded.model).kept:
        return 0
    old, new = Parts(folded, folded.model), Parts(folded, model)
    names = {tensor.name for tensor in model.graph.initializer}
    changed = {name for name in names if not folded.model.has(name) or _differs(folded.model, model, name)}
    for position in range(len(folded.scope.nodes)):
        nodes = [parts.node(position) for parts in (old, new)]
        if nodes[0] == nodes[1] and changed.isdisjoint(all_inputs(nodes[1])):
            continue
        if not new.is_constant[position]:
            return position
        changed.update(nodes[1].output)
    return len(folded.scope.nodes)


def _differs(first: Model, second: Model, name: str) -> bool:
    """Return whether two models have different initializers of a name; lazy ones are compared by their sizes."""
    one, other = first.lazy_array(name), second.lazy_array(name)
    if one is other or tuple(one.shape) != tuple(other.shape):
        return one is not other
    return isinstance(one, Lazy) or isinstance(other, Lazy) or one.tobytes() != other.tobytes()
