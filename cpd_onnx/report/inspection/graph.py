"""The graph of a model as a drawing: blocks of nodes in layers, and the groups of coupled channels that they hold.

The layout is that of Sugiyama et al. (Methods for Visual Understanding of Hierarchical System Structures, 1981): layers
by longest path, order within a layer by the mean of the neighbours, and long edges routed through each layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpd_onnx.channels.groups import Combed
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Value

MOST_BLOCKS = 700
"""Number of blocks above which straight sequences become one block each, and above which the drawing ends; a heuristic
for what a browser draws fluently."""
_WIDTH, _HEIGHT, _LANE = 196.0, 44.0, 18.0
"""Size of a block, and width of the lane of an edge that passes a layer, in pixels."""
_GAP, _LAYER_GAP, _MARGIN = 22.0, 30.0, 14.0
"""Distance of blocks, of layers, and of both from the margin, in pixels."""
_SWEEPS = 12
"""Number of sweeps that order the layers, and that move the blocks towards their neighbours (heuristic)."""
_MOST_LANES = 20_000
"""Number of passed layers above which edges are drawn straight (heuristic)."""


@dataclass(eq=False)
class Block:
    """Consecutive nodes that are drawn as one.

    Attributes:
        operators: Their operators, in order.
        names: Names of the nodes, or of their first outputs.
        weight: Name and shape of the first weight matrix or kernel.
        macs: Multiply-accumulates of one sample.
        groups: Groups whose channels its output has.
        touched: All groups whose channels its weights or its output have.
        before: Blocks whose outputs it takes.
        last: Position of its last node; -1 for an input or output of the model.
        x, y: Centre of the top edge, in pixels.
    """

    operators: list[str]
    names: list[str]
    weight: str = ""
    macs: float = 0.0
    groups: list[int] = field(default_factory=list)
    touched: set[int] = field(default_factory=set)
    before: list[Block] = field(default_factory=list)
    last: int = -1
    x: float = 0.0
    y: float = 0.0

    @property
    def left(self) -> float:
        """Left edge, in pixels."""
        return self.x - _WIDTH / 2

    @property
    def is_border(self) -> bool:
        """Whether it is an input or output of the model."""
        return self.last < 0


@dataclass(frozen=True, eq=False)
class Drawing:
    """Blocks with their places, and the edges between them as paths.

    Attributes:
        blocks: The blocks from top to bottom.
        edges: An SVG path for each part of an edge, with the groups whose channels run along it.
        width, height: Size in pixels.
        hidden: Number of blocks that are not drawn.
    """

    blocks: Sequence[Block]
    edges: Sequence[tuple[str, list[int]]]
    width: float
    height: float
    hidden: int = 0
    block_width: float = _WIDTH
    block_height: float = _HEIGHT


def drawing(combed: Combed) -> Drawing:
    """Return the graph of a model; nodes that compute only constants and sizes are left out."""
    blocks = _Reader(combed).blocks()
    if len(blocks) > MOST_BLOCKS:
        blocks = _in_sequences(blocks)
    shown = blocks[:MOST_BLOCKS]
    there = set(map(id, shown))
    for block in shown:
        block.before = [other for other in block.before if id(other) in there]
    return _Layout(shown).run(len(blocks) - len(shown))


class _Reader:
    """Reads the main graph of a model as blocks."""

    def __init__(self, combed: Combed) -> None:
        self.combed, self.scope = combed, combed.folded.scope
        self.owner = combed.owners[0]
        self.macs: dict[int, float] = {}
        for cost in combed.recorder.costs:
            if cost.scope is self.scope:
                size = cost.factor * float(np.prod([len(axis) for axis in cost.axes]))
                self.macs[cost.node] = self.macs.get(cost.node, 0.0) + size / combed.folded.batch
        self.weights: dict[int, list[tuple[str, Sequence[int], set[int]]]] = {}
        for weight in combed.weights:
            for use in weight.uses:
                if use.use.scope is self.scope and weight.is_trained:
                    entry = (weight.name if not weight.is_vector else "", weight.shape, self.groups_of(use.axes))
                    self.weights.setdefault(use.use.node, []).append(entry)

    def blocks(self) -> list[Block]:
        """Return the blocks in the order of the graph."""
        made: dict[str, Block] = {}
        blocks = [self.border("input", name) for name in self.scope.inputs if self.is_shown(name)]
        made |= {block.names[0]: block for block in blocks}
        readers = self.readers()
        for position, node in enumerate(self.scope.nodes):
            if not any(self.is_shown(name) for name in node.output if name):
                continue
            before = list(dict.fromkeys(made[name] for name in sorted(all_inputs(node)) if name in made))
            if len(before) == 1 and self.continues(before[0], position, readers):
                block = before[0]
            else:
                block = Block([], [], before=before)
                blocks.append(block)
            self.enter(block, position)
            made |= {name: block for name in node.output if name}
        outputs = [self.border("output", name) for name in self.scope.outputs]
        for block in outputs:
            source = made.get(block.names[0])
            block.before = [source] if source is not None else []
        return blocks + outputs

    def readers(self) -> dict[str, set[int]]:
        """Return the nodes that read each tensor; outputs of the graph are read once more."""
        found: dict[str, set[int]] = {}
        for position, node in enumerate(self.scope.nodes):
            if any(self.is_shown(name) for name in node.output if name):
                for name in all_inputs(node):
                    found.setdefault(name, set()).add(position)
        for name in self.scope.outputs:
            found.setdefault(name, set()).add(-1)
        return found

    def is_shown(self, name: str) -> bool:
        """Return whether a tensor depends on the values of the inputs."""
        value: Value | None = self.scope.values.get(name)
        return value is not None and value.constants is None and value.value is None and not value.from_shape

    def continues(self, block: Block, position: int, readers: Mapping[str, set[int]]) -> bool:
        """Return whether a node joins the block before it: nothing else reads that, and the node has no matrix."""
        if block.is_border or any(name for name, _, _ in self.weights.get(position, [])) or position in self.macs:
            return False
        node, last = self.scope.nodes[position], block.last
        outputs = set(self.scope.nodes[last].output)
        return bool(outputs & all_inputs(node)) and all(readers.get(name, set()) <= {position} for name in outputs)

    def enter(self, block: Block, position: int) -> None:
        """Add a node to a block."""
        node = self.scope.nodes[position]
        block.operators.append(node.op_type)
        block.names.append(node.name or next(filter(None, node.output), ""))
        block.macs += self.macs.get(position, 0.0)
        for name, shape, groups in self.weights.get(position, []):
            if name and not block.weight:
                block.weight = f"{name} {' × '.join(map(str, shape))}"  # noqa: RUF001  # a multiplication sign
            block.touched |= groups
        tensor = self.combed.tensors.get(("", next(filter(None, node.output), "")))
        block.groups = sorted(self.groups_of((tensor.axes if tensor is not None else None) or []))
        block.touched.update(block.groups)
        block.last = position

    def border(self, kind: str, name: str) -> Block:
        """Return the block of an input or output of the model."""
        return Block([kind], [name])

    def groups_of(self, axes: Iterable[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> set[int]:
        """Return the groups with channels on some axes."""
        found: set[int] = set()
        for axis in axes:
            found.update(self.owner[self.combed.atoms.parts(axis)].ravel().tolist())
        return found - {-1}


def _in_sequences(blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks with each straight sequence of them merged into one."""
    readers: dict[int, int] = {}
    for block in blocks:
        for other in block.before:
            readers[id(other)] = readers.get(id(other), 0) + 1
    merged: dict[int, Block] = {}
    found: list[Block] = []
    for block in blocks:
        before = list({id(new): new for new in (merged[id(other)] for other in block.before)}.values())
        if (
            len(block.before) == 1
            and readers[id(block.before[0])] == 1
            and not (block.is_border or before[0].is_border)
        ):
            first = before[0]
            first.operators += block.operators
            first.names += block.names
            first.macs += block.macs
            first.groups, first.touched = block.groups, first.touched | block.touched
            merged[id(block)] = first
        else:
            block.before = before
            merged[id(block)] = block
            found.append(block)
    return found


@dataclass(eq=False)
class _Place:
    """A block, or the lane of an edge, in a layer."""

    block: Block | None
    layer: int
    up: list[_Place] = field(default_factory=list)
    down: list[_Place] = field(default_factory=list)
    rank: float = 0.0
    x: float = 0.0

    @property
    def width(self) -> float:
        return _LANE if self.block is None else _WIDTH


class _Layout:
    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.place = {id(block): _Place(block, 0) for block in blocks}
        self.layers: list[list[_Place]] = []
        self.chains: list[list[_Place]] = []

    def run(self, hidden: int) -> Drawing:
        self.assign_layers()
        self.route()
        self.order()
        self.spread()
        for number, layer in enumerate(self.layers):
            for place in layer:
                if place.block is not None:
                    place.block.x, place.block.y = place.x, _MARGIN + number * (_HEIGHT + _LAYER_GAP)
        width = max((place.x + place.width / 2 for layer in self.layers for place in layer), default=0.0) + _MARGIN
        height = len(self.layers) * (_HEIGHT + _LAYER_GAP) - _LAYER_GAP + 2 * _MARGIN
        edges = [(_path(*ends), sorted(groups)) for ends, groups in self.segments().items()]
        ordered = [place.block for layer in self.layers for place in layer if place.block is not None]
        return Drawing(ordered, edges, width, max(height, 2 * _MARGIN), hidden)

    def segments(self) -> dict[tuple[_Place, _Place], set[int]]:
        """Return the parts of the edges between layers, each once, with the groups whose channels run along it."""
        found: dict[tuple[_Place, _Place], set[int]] = {}
        for chain in self.chains:
            first, last = chain[0].block, chain[-1].block
            common = set(first.groups) & last.touched if first is not None and last is not None else set()
            for pair in itertools.pairwise(chain):
                found.setdefault(pair, set()).update(common)
        return found

    def assign_layers(self) -> None:
        """Put each block below those before it, and those without any just above the first that reads them."""
        readers: dict[int, list[Block]] = {}
        for block in self.blocks:
            place = self.place[id(block)]
            place.layer = max((self.place[id(other)].layer + 1 for other in block.before), default=0)
            for other in block.before:
                readers.setdefault(id(other), []).append(block)
        for block in self.blocks:
            if not block.before and id(block) in readers:
                place = self.place[id(block)]
                place.layer = max(0, min(self.place[id(b)].layer for b in readers[id(block)]) - 1)
        count = max((place.layer for place in self.place.values()), default=-1) + 1
        self.layers = [[] for _ in range(count)]
        for block in self.blocks:
            place = self.place[id(block)]
            self.layers[place.layer].append(place)

    def route(self) -> None:
        """Lead each edge through a lane in every layer that it passes."""
        pairs = [(self.place[id(other)], self.place[id(b)]) for b in self.blocks for other in b.before]
        is_routed = sum(end.layer - start.layer - 1 for start, end in pairs) <= _MOST_LANES
        shared: dict[tuple[int, int], _Place] = {}
        for start, end in pairs:
            chain = [start]
            for layer in range(start.layer + 1, end.layer if is_routed else 0):
                chain.append(self.lane(shared, start, layer))
            chain.append(end)
            for above, below in itertools.pairwise(chain):
                if below not in above.down:
                    above.down.append(below)
                    below.up.append(above)
            self.chains.append(chain)

    def lane(self, shared: dict[tuple[int, int], _Place], start: _Place, layer: int) -> _Place:
        """Return the lane of a layer that the edges from one block share."""
        key = (id(start), layer)
        if key not in shared:
            shared[key] = _Place(None, layer)
            self.layers[layer].append(shared[key])
        return shared[key]

    def order(self) -> None:
        """Order each layer by the mean rank of the neighbours above, then below, and so on."""
        for layer in self.layers:
            _rank(layer)
        for sweep in range(_SWEEPS):
            down = sweep % 2 == 0
            for layer in self.layers if down else reversed(self.layers):
                for place in layer:
                    near = place.up if down else place.down
                    place.rank = sum(other.rank for other in near) / len(near) if near else place.rank
                layer.sort(key=lambda place: place.rank)
                _rank(layer)

    def spread(self) -> None:
        """Move places towards the mean of their neighbours without overlaps, and the drawing to the margin."""
        for layer in self.layers:
            _settle(layer, [0.0] * len(layer))
        for sweep in range(_SWEEPS):
            down = sweep % 2 == 0
            for layer in self.layers if down else reversed(self.layers):
                near = [(place.up if down else place.down) or [place] for place in layer]
                _settle(layer, [sum(other.x for other in found) / len(found) for found in near])
        left = min((place.x - place.width / 2 for layer in self.layers for place in layer), default=0.0)
        for layer in self.layers:
            for place in layer:
                place.x += _MARGIN - left


def _rank(layer: Sequence[_Place]) -> None:
    for number, place in enumerate(layer):
        place.rank = (number + 0.5) / len(layer)


def _settle(layer: Sequence[_Place], wanted: Sequence[float]) -> None:
    """Move the places of a layer as near to the wanted ones as their widths allow: isotonic regression by pooling."""
    offset, offsets = 0.0, []
    for place, after in zip(layer, [*layer[1:], None], strict=True):
        offsets.append(offset)
        offset += (place.width + after.width) / 2 + _GAP if after is not None else 0.0
    pools: list[tuple[float, int]] = []
    for value in (x - own for x, own in zip(wanted, offsets, strict=True)):
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    starts = [mean for mean, count in pools for _ in range(count)]
    for place, start, own in zip(layer, starts, offsets, strict=True):
        place.x = start + own


def _path(above: _Place, below: _Place) -> str:
    """Return a part of an edge as an SVG path that leaves and enters the layers vertically, and passes a lane."""
    y, end = (_MARGIN + place.layer * (_HEIGHT + _LAYER_GAP) for place in (above, below))
    y += _HEIGHT
    middle = (y + end) / 2
    through = f"V{end + _HEIGHT:.0f}" if below.block is None else ""
    curve = f"C{above.x:.0f} {middle:.0f} {below.x:.0f} {middle:.0f} {below.x:.0f} {end:.0f}"
    return f"M{above.x:.0f} {y:.0f}{curve}{through}"
