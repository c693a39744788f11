"""Repair: fit the weights of a pruned model by least squares, so that it reproduces the outputs of the original.

Weights of linear operators are fitted one after the other to the original's output of the same operator, on the inputs
in the pruned and already repaired model, so that errors do not accumulate (He et al., Channel Pruning for Accelerating
Very Deep Neural Networks, ICCV 2017). If the output is added to another tensor (a residual connection), the error of
that tensor is compensated as well. No gradients, labels or torch are needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import ClassVar, TypeAlias, cast

import numpy as np
from onnx import TensorProto

from cpd_onnx.algebra.atoms import Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import branches, gone_groups, with_last
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.renormalized import renormalized
from cpd_onnx.data.images.crops import cropped
from cpd_onnx.data.sources import Source, calibration, inputs_of
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import DataError
from cpd_onnx.fitting.activation import activation_of
from cpd_onnx.fitting.graph import Graph
from cpd_onnx.fitting.least_squares import MAX_FEATURES, Rows, Sampler, one_thread
from cpd_onnx.fitting.output_error import any_alike, output_error, outputs_of
from cpd_onnx.fitting.problem import Block, Problem
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.io.progress import step, tracked
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ir.tensors import constant_tensors, held_array, hold
from cpd_onnx.options import option, positive
from cpd_onnx.pipeline.state import State
from cpd_onnx.rewrite.rewriter import in_line, out_of_line
from cpd_onnx.runtime.sessions import Feed, sample_count
from cpd_onnx.runtime.shards import Divided
from cpd_onnx.runtime.stream import Stop, Stream, Tensors, apart, batch_size, cuts_before, held_feeds
from cpd_onnx.scores.bases import changed, first_survive
from cpd_onnx.scores.reconstruction import bases

_BATCH = 32
"""Number of samples in a run of the models."""
_CHECKED = 8
"""One in this many rows is held out to validate the fit (heuristic)."""
_FEW = 200
"""Number of samples from which a confirmed fit is made again from all of them; below it, a note says that they are few,
unless no more were asked for (heuristic)."""
_LEAST = 2
"""Number of samples that a repair takes: one to fit and one to check."""
_TARGET_BYTES = 128 << 20
"""Approximate number of bytes of the targets that are sampled in one run of the original (heuristic)."""
_FEW_OTHERS = 0.25
"""Largest fraction of batches in which features may have other sizes in the two models (heuristic): where these are
few, the same rows are selected in the others, and a weight is fitted to them."""
_OTHER_SIZES = "the sizes of its input depend on values, and differ between the pruned model and the original"
"""Why a weight was not fitted whose features have other sizes in the two models."""
_NO_ERROR = "the sizes of the outputs depend on values, and differ from the original's: no error can be measured"
"""Why no weight was fitted in a model whose outputs have other sizes on all held-out samples."""
_ITEM = 4
"""Number of bytes of an element of a target."""

_PRECISIONS: dict[int, float] = {TensorProto.FLOAT16: 2.0**-10, TensorProto.BFLOAT16: 2.0**-7}
"""Precision of numbers by their type: an error that is no larger is nothing but rounding."""

Targets: TypeAlias = tuple[Array, Rows, tuple[int, ...] | None, Rows | None]
"""Positions in a batch, the targets at them [groups, rows, outputs], the shape that the features must have in the
pruned model for its positions to be the same ones, or None where sizes do not depend on values, and the features
[groups, rows, features], or None where they are those in the pruned model."""


@dataclass(frozen=True)
class RepairOptions:
    """Options of the repair.

    Attributes:
        samples: Number of samples.
        rows: Approximate number of rows (positions in the samples) for each fit.
        ridge: Minimum strength of the regularization towards the initial weights, as a fraction of the mean square of a
            feature; stronger values are chosen if they are better on held-out rows.
        rounds: Number of times that targets follow the fitted values where an activation hides the difference, as a
            rectifier does below zero; 0 fits the inputs of activations.
        seed: Seed of the choice of samples and rows.
        mixes: Whether channels that survive are replaced by the linear combinations that matter most, where nothing
            but sums and weights use them, see `scores.bases`.
        refits: Whether fits that the held-out samples have confirmed are made again from all.
    """

    samples: int = option(512, "Number of samples used for the repair", read=positive)
    rows: int = 1 << 16
    ridge: float = 1e-3
    rounds: int = 8
    seed: int = 0
    mixes: bool = True
    refits: bool = True


@dataclass(frozen=True)
class Fit:
    """One fitted weight.

    Attributes:
        weight: Name of the weight.
        target: Tensor whose values in the original are the targets.
        before, after: Root mean square error over the standard deviation of the target, on held-out rows.
    """

    weight: str
    target: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Repaired:
    """A model with fitted weights.

    Attributes:
        model: The model.
        fits: Fitted weights in the order of the graph.
        left: Weights of linear operators that were not fitted, and why.
        notes: What the user should know, such as that the samples were too few.
    """

    model: Model
    fits: tuple[Fit, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@step("repair")
def repair(
    combed: Combed,
    kept: KeepMask,
    pruned: Model,
    data: Source,
    options: RepairOptions | None = None,
    *,
    only: Container[str] | None = None,
) -> Repaired:
    """Fit the weights of a pruned model to the original.

    An eighth of the samples (a third of fewer than 32) is held out: a weight is fitted only if that lowers its error on
    them. With 200 samples or more, it is then fitted again to all, those held out included. If the error of the outputs
    on the latter does not fall, the result is the pruned model, and a note says so. If it does, and there are fewer
    than 32 samples, all weights are fitted again to all samples.

    Args:
        combed: The original.
        kept: Mask of what survives of it.
        pruned: The pruned model, which is not changed.
        data: Samples; labels are not used. Where they are generated, the statistics that batch normalizations store
            are those of the samples during the repair.
        options: Options of the repair.
        only: Weights that may be fitted; None means all.

    Raises:
        DataError: The data does not fit the model or there is none.
        UnsupportedError: onnxruntime cannot run a part of the model.
    """
    chosen = options or RepairOptions()
    made = _in_line(combed, kept, in_line(combed, kept, pruned), data, chosen, only)
    known = {*(tensor.name for tensor in pruned.graph.initializer), *constant_tensors(pruned)}
    fits = tuple(fit for fit in made.fits if fit.weight in known)
    read = {name for node in pruned.graph.node for name in node.input}
    left = {name: why for name, why in made.left.items() if name in known or name in read}
    return replace(made, model=out_of_line(combed, kept, made.model), fits=fits, left=left)


def _in_line(
    combed: Combed, kept: KeepMask, pruned: Model, data: Source, chosen: RepairOptions, only: Container[str] | None
) -> Repaired:
    """Fit the weights of a pruned model that has all nodes of the original."""
    # The sensitivity repairs a few weights many times, for which it does not pay to run the model once more.
    likened = renormalized(combed, data, chosen.seed) if only is None else None
    if likened is None:
        return _repaired(combed, kept, pruned, data, chosen, only)
    whole = with_last(combed, kept, gone_groups(combed, kept))
    made = _repaired(likened.combed, kept, likened.entered(pruned, whole), data, chosen, only)
    return replace(made, model=likened.left(pruned, made.model))


def _repaired(
    combed: Combed, kept: KeepMask, pruned: Model, data: Source, chosen: RepairOptions, only: Container[str] | None
) -> Repaired:
    original = combed.folded.model
    most = chosen.samples if data.count is None else min(chosen.samples, data.count)
    # So that held-out samples are whole batches.
    batch = batch_size(combed.folded, max(1, min(_BATCH, most // _CHECKED)))
    feeds = held_feeds(calibration(original, data, chosen.samples, batch=batch, seed=chosen.seed))
    count = sum(map(sample_count, feeds))
    if count < _LEAST:
        return Repaired(pruned.copy(), (), {}, (f"nothing was repaired, which takes {_LEAST} samples or more",))
    place = len(feeds) - _held_out([*map(sample_count, feeds)])
    fitted, checks = feeds[:place], feeds[place:]
    if only is None and not isinstance(data, Synthetic):
        fitted += cropped(fitted, inputs_of(original.proto), chosen.samples - count, chosen.seed)
    del feeds
    mixes = chosen.mixes and not isinstance(data, Synthetic)
    goal, start = _mixed(combed, kept, pruned, fitted, chosen.seed) if mixes else (combed, pruned)
    again = list(fitted) if count < _BATCH <= chosen.samples and only is None and chosen.refits else []
    repairer = _Repairer(goal, kept, start, (fitted, checks), chosen, only)
    del fitted  # the repair drops samples that it does not need any more
    with one_thread():
        made = repairer.run(refits=chosen.refits and only is None and count >= _FEW)
    del repairer
    if only is not None:
        return made
    if count < min(_FEW, chosen.samples) and not isinstance(data, Synthetic):
        made = replace(made, notes=(f"the repair had {count} samples only: a few hundred make it more accurate",))
    if made.fits or start is not pruned:
        made = _unless_worse(original, pruned, made, checks)
    if not again or not made.fits:
        return made
    with one_thread():  # what a third of very few samples has confirmed gains clearly from that third
        more = _Repairer(goal, kept, start, (again, checks), chosen, only).run(refits=True)
    return replace(more, notes=made.notes)


def _mixed(combed: Combed, kept: KeepMask, pruned: Model, feeds: Sequence[Feed], seed: int) -> tuple[Combed, Model]:
    """Return the original and the pruned model with the best combinations of channels in groups that lose some."""
    survive = {group.id: kept.mask(group.channels) for group in combed.groups}
    narrow = {index for index, mask in survive.items() if 0 < np.count_nonzero(mask) < len(mask)}
    with one_thread():
        found = bases(combed, feeds, seed, narrow)
        found = {mixable: first_survive(basis, survive[mixable.group.id]) for mixable, basis in found.items()}
    if not found:
        return combed, pruned
    original, names = changed(combed, found)
    small, whole = pruned.copy(), with_last(combed, kept, gone_groups(combed, kept))
    axes = {weight.value.name: weight.axes[0] for weight in combed.weights if not weight.scope.address}
    for name in names:
        hold(small, name, _kept(held_array(original, name), [whole.mask(axis) for axis in axes[name]]))
    return replace(combed, folded=replace(combed.folded, model=original)), small


def _held_out(sizes: Sequence[int]) -> int:
    """Return how many of the last batches are held out, from their sizes; none of a single one.

    They have an eighth of the samples, or a third where these are very few: a last batch that is smaller than the
    others does not count as one of them.
    """
    count, most, parts = sum(sizes), max(sizes), 3 if sum(sizes) < _BATCH else _CHECKED
    wanted = most * max(1, count // most // parts)
    number = next(n for n in range(1, len(sizes) + 1) if sum(sizes[-n:]) >= min(wanted, count))
    return min(number, len(sizes) - 1)


def _unless_worse(original: Model, pruned: Model, made: Repaired, feeds: Sequence[Feed]) -> Repaired:
    """Return a repair, or the pruned model if the outputs on held-out samples are no nearer to the original's."""
    if not feeds or original.is_over_limit:
        return made
    wanted = list(outputs_of(original, feeds))
    before, after = (output_error(wanted, outputs_of(model, feeds)) for model in (pruned, made.model))
    if after < before or before == 0:
        return made
    if not any_alike(wanted, outputs_of(pruned, feeds)):
        left = dict.fromkeys((fit.weight for fit in made.fits), _NO_ERROR)
        return Repaired(pruned.copy(), (), {**made.left, **left}, (f"nothing was repaired: {_NO_ERROR}",))
    note = (
        f"nothing was repaired: it would not have lowered the error of the outputs on held-out samples ({before:.3g} "
        f"of their variance before, {after:.3g} after); more samples, or samples that are more varied, may help"
    )
    left = {fit.weight: "no better on held-out samples" for fit in made.fits}
    return Repaired(pruned.copy(), (), {**made.left, **left}, (note,))


@dataclass(frozen=True)
class Repair(RepairOptions):
    """Fit the weights of the pruned model to the original by least squares."""

    name: ClassVar[str] = "repair"
    requires: ClassVar[tuple[str, ...]] = ("combed", "allocation", "plan")
    provides: ClassVar[tuple[str, ...]] = ("repaired",)

    def __call__(self, state: State) -> State:
        """Fill in `repaired`; `model` becomes the model with fitted weights, which are recorded in the plan."""
        if state.data is None:
            raise DataError("a repair needs samples: give --data, or a source as `data`")
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        options = RepairOptions(**{f.name: getattr(self, f.name) for f in fields(RepairOptions)})
        repaired = repair(combed, chosen.keep_mask(combed), state.model, state.data, options)
        plan = state.plan and state.plan.with_values(state.model, repaired.model)
        return replace(state, model=repaired.model, repaired=summary(repaired), plan=plan)


def summary(repaired: Repaired) -> dict[str, object]:
    """Return the fitted and the other weights as plain values."""
    return {
        "fitted": [
            {"weight": f.weight, "before": round(f.before, 5), "after": round(f.after, 5)} for f in repaired.fits
        ],
        "left": dict(repaired.left),
        "notes": list(repaired.notes),
    }


class _Repairer:
    """Fits weight after weight while batches stream through the original and the pruned model in the same pieces."""

    def __init__(
        self,
        combed: Combed,
        kept: KeepMask,
        pruned: Model,
        samples: tuple[Sequence[Feed], Sequence[Feed]],
        options: RepairOptions,
        only: Container[str] | None,
    ) -> None:
        """Prepare to fit a model, by samples to fit and samples to check."""
        gone = gone_groups(combed, kept)
        feeds = [*samples[0], *samples[1]]
        self.combed, self.options = combed, options
        self.kept, self.silent = with_last(combed, kept, gone), kept
        self.model = pruned.copy()
        found, cut = units_of(combed.folded, self.model), branches(combed, gone)
        unread = cut.lost | cut.unread
        used = [tuple(unit for unit in units if unit.position not in unread) for units in found.by_weight]
        self.units = [units for units in used if units and (only is None or units[0].weight in only)]
        each = [unit for units in self.units for unit in units]
        self.graph = Graph(combed.folded, self.model)
        single = [units[0] for units in self.units if len(units) == 1 and not units[0].is_clipped]
        self.activations = {unit.weight: activation_of(self.graph, unit) for unit in single}
        self.left = {name: why for name, why in found.left.items() if only is None or name in only}
        self.makers = combed.folded.scope.producers
        self.held_out = len(samples[1])
        self.old = Stream(combed.folded, combed.folded.model, feeds, self.held_out)
        self.new = Stream(combed.folded, self.model, feeds, self.held_out)
        for stream in (self.old, self.new):  # data may be that from before a quantisation
            stream.keep_alive({name: unit.position for unit in each for name in unit.taken})
        is_computed = not all(unit.is_observed for unit in each)
        self.whole = {unit.weight: unit for unit in units_of(combed.folded).found} if is_computed else {}
        self.sampler = Sampler(options.rows, options.seed, self.old.sizes)
        inner = {unit.weight for unit in each if unit.is_inner and not unit.linear.is_stacked}
        self.columns = {w.value.name: w.axes[0][-1] for w in combed.weights if w.value.name in inner}

    def run(self, *, refits: bool = False) -> Repaired:
        """Fit all weights; with `refits`, to all samples once the held-out ones have confirmed a fit."""
        fits = []
        cuts = cuts_before([units[0].position for units in self.units], self.old)
        parts = self.parts(cuts)
        targets: dict[int, Divided[tuple[Targets, ...]]] = {}
        for number, units in tracked(list(enumerate(self.units))):
            if number in parts:
                targets = self.targets(parts[number], cuts.get(number))
            blocks = self.blocks(number, targets.pop(number), cuts.get(number))
            is_resized = any(map(self.is_resized, units))
            found = _alike(blocks, self.held_out) if is_resized else (cast("Divided[Block]", blocks), self.held_out)
            if found is None:
                self.left[units[0].weight] = _OTHER_SIZES
                continue
            fit = self.fit(units[0], *found, refits=refits)
            if fit is not None:
                fits.append(fit)
        return Repaired(self.model, tuple(fits), self.left)

    def parts(self, cuts: Container[int]) -> dict[int, list[int]]:
        """Return weights whose targets are sampled in one run of the original, by the first of them."""
        found: dict[int, list[int]] = {}
        first, size = 0, 0
        for number, units in enumerate(self.units):
            groups, _, outputs = shape = units[0].matrix(self.model).shape
            taken = _ITEM * groups * outputs * self.sampler.most(shape)
            if number in cuts or not found or size + taken > _TARGET_BYTES:
                first, size = number, 0
            found.setdefault(first, []).append(number)
            size += taken
        return found

    def targets(self, numbers: Sequence[int], cut: int | None) -> dict[int, Divided[tuple[Targets, ...]]]:
        """Return the positions of the rows of some weights in each batch, and the original's outputs at them.

        Those of a batch are given for each unit of a weight.
        """
        owners = [number for number in numbers for _ in self.units[number]]
        units = [unit for number in numbers for unit in self.units[number]]
        masks = [[self.kept.mask(axis) for axis in self.combed.tensors[("", unit.target)].axes or []] for unit in units]
        shapes = [unit.matrix(self.model).shape for unit in units]

        def look(stop: int, batch: int, tensors: Tensors) -> Targets:
            unit, whole = units[stop], self.whole.get(units[stop].weight)
            size = self.size_left(unit.data, tensors[unit.data]) if self.is_resized(unit) else None
            wanted = _kept(tensors[unit.target], masks[stop])
            sampler = replace(self.sampler, rows=self.sampler.rows // len(self.units[owners[stop]]))
            places = sampler.places((owners[stop], batch), unit.linear, shapes[stop], wanted)
            if whole is None or unit.is_observed:
                return places, apart(unit.linear.targets(unit.real(unit.target, wanted), places)), size, None
            real = {} if whole.other is None else {whole.other: whole.real(whole.other, tensors[whole.other])}
            rows = whole.rows(tensors, places)
            made = whole.unrounded(rows, places, real, whole.matrix(self.combed.folded.model))
            mask = masks[stop][unit.linear.out_axis]
            if unit.is_inner and not unit.linear.is_stacked:  # its outputs are not those of the operator
                mask = self.kept.mask(self.columns[unit.weight])
            if not unit.linear.is_stacked:
                return places, apart(_kept_outputs(made, mask, shapes[stop])), size, None
            made = apart(np.compress(np.tile(mask, made.shape[2] // len(mask)), made, axis=2))
            if not unit.is_fed_back:
                return places, made, size, None
            # The states of the pruned model differ much from these until the weight is fitted.
            axes = self.combed.tensors[("", unit.data)].axes or []
            seen = rows * self.silent.mask(axes[unit.linear.in_axis]).astype(np.float32)
            return places, made, size, apart(np.compress(mask, seen, axis=2))

        order = sorted(range(len(units)), key=lambda stop: (self.makers[units[stop].target], stop))
        names = [self.observed(unit) for unit in units]
        stops = [Stop(self.makers[units[stop].target], names[stop]) for stop in order]
        found = self.old.looks(stops, lambda stop, *of: look(order[stop], *of), cut=cut)
        own = {n: [order.index(stop) for stop, owner in enumerate(owners) if owner == n] for n in numbers}
        return {number: found.map(partial(_chosen, places)) for number, places in own.items()}

    def observed(self, unit: Unit) -> tuple[str, ...]:
        """Return the tensors of the original that the targets of a unit are computed from."""
        if unit.is_observed or unit.weight not in self.whole:
            return (unit.target, unit.data) if self.is_resized(unit) else (unit.target,)
        return tuple(dict.fromkeys((unit.target, *unit.taken, *([unit.other] if unit.other else []))))

    def is_resized(self, unit: Unit) -> bool:
        """Return whether sizes of a unit's features depend on values, so that those in the pruned model may differ."""
        value = self.combed.folded.scope.values.get(unit.data)
        return value is None or value.depends_on_values

    def size_left(self, name: str, array: Array) -> tuple[int, ...]:
        """Return the shape of what survives of a tensor of the original."""
        tensor = self.combed.tensors.get(("", name))
        if tensor is None or tensor.axes is None:
            return array.shape
        pairs = zip(map(self.kept.mask, tensor.axes), array.shape, strict=True)
        return tuple(int(mask.sum()) if len(mask) == size else size for mask, size in pairs)

    def blocks(self, number: int, targets: Divided[tuple[Targets, ...]], cut: int | None) -> Divided[Block | None]:
        """Return features in the pruned model and targets from the original at the same positions.

        None stands for a batch in which the features have another size than in the original.
        """
        units = self.units[number]
        has_activation = units[0].is_clipped or self.activations.get(units[0].weight) is not None
        if units[0].is_fed_back:
            return targets.map(_fed_back)
        silent = [list(self.silent_masks(unit.data)) for unit in units]

        def look(stop: int, batch: int, tensors: Tensors) -> Block | None:
            unit, (places, wanted, size, _) = units[stop], targets.of(batch)[stop]
            if size is not None and tensors[unit.data].shape != size:
                return None
            other = None
            if unit.other is not None:
                other = unit.linear.targets(unit.real(unit.other, tensors[unit.other]), places)
                wanted = wanted - other
            other = apart(other) if other is not None and has_activation else None
            return Block(apart(unit.rows(tensors, places, silent[stop])), apart(wanted), other)

        stops = [Stop(unit.position - 1, (*unit.taken, *([unit.other] if unit.other else []))) for unit in units]
        return self.new.looks(stops, look, cut=cut).map(_together)

    def silent_masks(self, name: str) -> Iterator[Array]:
        """Yield masks, which broadcast against a tensor, of the channels that survive in `kept` alone."""
        tensor = self.combed.tensors.get(("", name))
        axes = (tensor and tensor.axes) or []
        for place, axis in enumerate(axes):
            mask = self.silent.mask(axis)[self.kept.mask(axis)]
            if not mask.all():
                yield mask.astype(np.float32).reshape([-1 if i == place else 1 for i in range(len(axes))])

    def fit(self, unit: Unit, blocks: Divided[Block], held_out: int, *, refits: bool) -> Fit | None:
        """Fit and store a weight; returns None if it needs no repair or does not improve."""
        start = unit.matrix(self.model)
        if start.shape[1] > MAX_FEATURES:
            return None
        options = self.options
        blocks, held_out = _divided(blocks, held_out)
        made = Problem(
            blocks, held_out, start, unit.gain, unit.shift, unit.bias is not None, unit.bounds,
            options.ridge, options.rounds, refits, unit.steps(self.model),
            lambda constant: unit.stored_constant(self.model, constant), unit.noise,
            self.activations.get(unit.weight),
            _PRECISIONS.get(self.graph.type_of(unit.target), 0.0),
        ).solved()  # fmt: skip  # a list
        if made is None:
            return None
        unit.store(self.model, made.matrix, made.constant, made.scales)
        return Fit(unit.weight, unit.target, made.before, made.after)


def _kept(array: Array, masks: Sequence[Mask]) -> Array:
    for axis, mask in enumerate(masks):
        if len(mask) == array.shape[axis] and not mask.all():
            array = np.compress(mask, array, axis=axis)
    return array


def _kept_outputs(array: Array, mask: Mask, shape: Sequence[int]) -> Rows:
    """Return the outputs that survive, for a matrix of a shape (groups, features, outputs) [groups, rows, outputs]."""
    groups, _, outputs = shape
    flat = array.transpose(1, 0, 2).reshape(array.shape[1], -1)
    flat = flat if len(mask) != flat.shape[1] else np.compress(mask, flat, axis=1)
    return np.ascontiguousarray(flat.reshape(len(flat), groups, outputs).transpose(1, 0, 2))


def _together(blocks: Sequence[Block | None]) -> Block | None:
    """Return the rows of the units of a weight in one batch; None if those of one of them are missing."""
    known = [block for block in blocks if block is not None]
    if len(known) < len(blocks):
        return None
    return known[0] if len(known) == 1 else Block.joined(known)


def _chosen(places: Sequence[int], results: Sequence[Targets]) -> tuple[Targets, ...]:
    return tuple(results[place] for place in places)


def _fed_back(targets: Sequence[Targets]) -> Block | None:
    """Return the rows of a weight whose features are those in the original."""
    ((_, wanted, _, seen),) = targets
    assert seen is not None
    return Block(seen, wanted)


def _alike(blocks: Divided[Block | None], held_out: int) -> tuple[Divided[Block], int] | None:
    """Return the batches without those in which the features have other sizes, and how many of them are held out.

    None if there are too many of those, or all that are held out or all others are among them.
    """
    places = [number for number, known in enumerate(blocks.each(lambda block: block is not None)) if known]
    checks = sum(number >= len(blocks) - held_out for number in places)
    if len(places) < (1 - _FEW_OTHERS) * len(blocks) or checks == len(places) or (held_out and not checks):
        return None
    return cast("Divided[Block]", blocks.at(places)), checks


def _divided(blocks: Divided[Block], held_out: int) -> tuple[Divided[Block], int]:
    """Return blocks and the number of those held out; the rows of a single block are divided for that."""
    if held_out:
        return blocks, held_out
    (count,) = blocks.each(lambda block: block.rows.shape[1])
    if count < _CHECKED:
        return blocks, held_out
    place = count - count // _CHECKED
    parts = (slice(0, place), slice(place, None))
    items = [None if block is None else block.part(part) for part in parts for block in blocks.items]
    return Divided(items, [*blocks.parts] * len(parts), blocks.group), 1
