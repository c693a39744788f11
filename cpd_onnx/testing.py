"""Four oracles that need no trained model and hold for any architecture, for tests of rules, files and exporters.

Each takes whatever `cpd_onnx.load` takes and returns an `Outcome`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis, fingerprint
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Allocation, Budget, allocate
from cpd_onnx.channels.branches import branches, removable_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.constraints import operand_value
from cpd_onnx.channels.groups import QUANTIZED, Combed, Weight
from cpd_onnx.channels.weights import weight_array
from cpd_onnx.ir.model import Array, Model, ModelSource, attributes_of, load
from cpd_onnx.ops.evaluate import EVALUATORS, Call
from cpd_onnx.passes.prune import prune
from cpd_onnx.proof.comparison import VERIFIED, WRONG, Comparison
from cpd_onnx.proof.masking import zero_of
from cpd_onnx.proof.proving import equal, verify
from cpd_onnx.scores.registry import score
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Scope


@dataclass(frozen=True)
class Outcome:
    """Result of an oracle.

    Attributes:
        passed: Whether the verdict is "verified".
        difference: Largest difference between outputs, relative to their largest value.
        groups: Number of groups that were exercised; with 0, nothing was proved.
        verdict: "verified", "inconclusive" or "wrong".
        notes: Reasons for an inconclusive verdict.

    """

    passed: bool
    difference: float
    groups: int
    verdict: str
    notes: tuple[str, ...] = ()


def mask_oracle(source: ModelSource, *, fraction: float = 0.5, seed: int = 0) -> Outcome:
    """Check that the model with random channels pruned equals the original with these channels masked.

    Raises TargetError if the model has nothing to prune, ProofError if the pruned shapes are wrong.
    """
    combed = comb(load(source))
    chosen = allocate(combed, score(combed, "random", seed=seed), Budget("channels", fraction))
    pruned = prune(combed, chosen)
    found = verify(combed, chosen.keep_mask(combed), pruned.model)
    return _outcome(found, sum(bool(r) for r in chosen.removed))


def depth_oracle(source: ModelSource, *, fraction: float = 0.5, seed: int = 0) -> Outcome:
    """Check that the model without random branches equals the original with all their channels masked.

    Channels of the other groups are pruned at random as well. `groups` counts the groups that are removed as a whole;
    a model without such groups passes with 0.
    """
    combed = comb(load(source))
    chosen = allocate(combed, score(combed, "random", seed=seed), Budget("channels", fraction))
    chosen, gone = without_branches(combed, chosen, fraction, seed)
    return _outcome(verify(combed, chosen.keep_mask(combed), prune(combed, chosen).model), gone)


def without_branches(combed: Combed, chosen: Allocation, fraction: float, seed: int) -> tuple[Allocation, int]:
    """Return an allocation that removes about a fraction of the branches too, at random, and how many these are."""
    rng, removed, gone = np.random.default_rng(seed), [list(own) for own in chosen.removed], list[int]()
    for index in rng.permutation(sorted(removable_groups(combed))).tolist():
        if rng.random() < fraction and not branches(combed, [*gone, index]).obstacle:
            gone.append(index)
            removed[index] = list(range(len(combed.groups[index])))
    return replace(chosen, removed=removed), len(gone)


def _outcome(found: Comparison, groups: int) -> Outcome:
    return Outcome(found.passed, found.difference, groups, found.verdict, found.notes)


def permutation_oracle(source: ModelSource, *, seed: int = 0) -> Outcome:
    """Check that permuting the channels of each group in all its members changes no output.

    A group of coupled channels is a symmetry of the network, so a single missed coupling changes an output. It is not
    one if some of its channels are at positions that are selected or padded differently from the others, if an operator
    sums over neighbours, or if an index is removed with either of two of its channels (a pair of groups at a channel
    shuffle); such groups are not permuted.
    Each group has its own permutation; a channel that occurs several times on an axis (the gates of
    an LSTM, the halves of a gated unit) is moved occurrence by occurrence.
    """
    combed = comb(load(source))
    image, groups = _permutation(combed, np.random.default_rng(seed))
    moved = np.zeros(0, np.int64)
    if groups:
        chosen = allocate(combed, score(combed, "random", seed=seed), Budget("channels", 0.5)).channels(combed)
        moved = chosen[image[chosen] != chosen]
    return _outcome(equal(combed, _permuted(combed, image), moved), groups)


def widen_oracle(source: ModelSource, *, seed: int = 0) -> Outcome:
    """Check that pruning inserted dead channels by score restores the same bytes.

    The narrow model is the source with random channels pruned; the wide model is the source with the weights of those
    channels zeroed, which equals the narrow one with dead channels inserted. The L2 score must select exactly these.
    """
    combed = comb(load(source))
    magnitude = score(combed, "l2")
    chosen = allocate(combed, score(combed, "random", seed=seed), Budget("channels", 0.5))
    removed = [r if m.all() else [] for r, m in zip(chosen.removed, magnitude, strict=True)]
    dead = Allocation(removed, chosen.before, chosen.after)
    narrow = prune(combed, dead).model.serialize()
    wide = comb(_zeroed(combed, dead.keep_mask(combed)))
    lowest = [
        sorted(np.argsort(s, kind="stable")[: len(r)].tolist()) for s, r in zip(score(wide, "l2"), removed, strict=True)
    ]
    back = prune(wide, Allocation(lowest, chosen.before, chosen.after)).model.serialize()
    is_same = back == narrow
    found = (0.0, VERIFIED) if is_same else (float("inf"), WRONG)
    return Outcome(is_same, found[0], sum(map(bool, removed)), found[1])


def _permutation(combed: Combed, rng: np.random.Generator) -> tuple[Axis, int]:
    """Return for each atom the one whose position it takes, and the number of permuted groups.

    Groups that cannot be permuted on one of their axes are left unchanged.
    """
    image = np.arange(len(combed.atoms))
    for group in combed.groups:
        image[group.channels] = rng.permutation(group.channels)
    if combed.groups and (image == np.arange(len(image))).all():
        order = combed.groups[0].channels
        image[order] = np.roll(order, 1)
    axes, moves = _axes(combed), list(_moves(combed))
    _leave(combed, image, _placed(combed))
    _leave(combed, image, _paired(combed, axes))
    stuck = True
    while stuck:
        stuck = False
        for axis in axes:
            if _order(combed.atoms, axis, image) is None:
                stuck |= _leave(combed, image, combed.atoms.parts(axis))
        for axis, result, picked in moves:
            before, after = (_order(combed.atoms, a, image) for a in (axis, result))
            if before is None or after is None or not np.array_equal(before[picked], picked[after]):
                stuck |= _leave(combed, image, combed.atoms.parts(axis))
    return image, sum(bool((image[g.channels] != g.channels).any()) for g in combed.groups)


def _leave(combed: Combed, image: Axis, atoms: Axis) -> bool:
    """Undo the permutation of the groups that contain these atoms; return whether one of them was permuted."""
    owner, moved = combed.owners[0], False
    for index in set(np.unique(owner[atoms[atoms != NOTHING]]).tolist()) - {-1}:
        channels = combed.groups[index].channels
        moved |= bool((image[channels] != channels).any())
        image[channels] = channels
    return moved


def _axes_of(combed: Combed, scope: Scope, name: str) -> list[Axis]:
    tensor = combed.tensors.get((scope.path, name))
    return (tensor and tensor.axes) or []


def _nodes(combed: Combed, *operators: str) -> Iterator[tuple[Scope, NodeProto]]:
    for scope in combed.folded.scope.walk():
        yield from ((scope, node) for node in scope.nodes if node.op_type in operators and not node.domain)


def _placed(combed: Combed) -> Axis:
    """Return the atoms that cannot be permuted with others.

    Padding inserts values there, neighbours are summed, or several share a byte of zero points.
    """
    found = [np.zeros(0, np.int64)]
    for scope, node in _nodes(combed, "LRN"):
        found += [combed.atoms.parts(axis).ravel() for axis in _axes_of(combed, scope, node.output[0])[1:2]]
    for use in combed.recorder.size_uses:
        packed = operand_value(use)
        if packed is not None and packed.dtype in QUANTIZED:
            found.append(combed.atoms.parts(use.axes[-1]).ravel())
    for scope, node in _nodes(combed, "Pad"):
        for pair in zip(*(_axes_of(combed, scope, name) for name in (node.input[0], node.output[0])), strict=False):
            before, after = (np.bincount(combed.atoms.parts(a).ravel(), minlength=len(combed.atoms)) for a in pair)
            found.append(np.flatnonzero(before != after))
    return np.concatenate(found)


def _paired(combed: Combed, axes: Sequence[Axis]) -> Axis:
    """Return the atoms of indices that depend on two channels of the same group, whose order the atoms do not tell."""
    found = [np.zeros(0, np.int64)]
    for parts in map(combed.atoms.parts, axes):
        owners = np.sort(np.where(parts == NOTHING, -1, combed.owners[0][parts]), axis=1)
        rows = ((owners[:, 1:] == owners[:, :-1]) & (owners[:, 1:] >= 0)).any(axis=1)
        found.append(parts[rows].ravel())
    return np.concatenate(found)


def _moves(combed: Combed) -> Iterator[tuple[Axis, Axis, Axis]]:
    """Yield for each node that selects positions of an axis: the axis, the result's axis, and the selected positions.

    An axis may hold a channel several times. A channel of which the first and the second position are selected cannot
    be permuted with one of which only the first is.
    """
    for axis, blocks, _ in combed.recorder.balanced:
        for block in np.split(np.arange(len(axis)), blocks):
            yield axis, axis[block], block
    for scope, node in _nodes(combed, "Gather", "Slice", "Split"):
        known = [scope.lookup(name) if name else None for name in node.input[1:]]
        operands = [None if value is None or value.values is None else value.values[0] for value in known]
        if any(name and operand is None for name, operand in zip(node.input[1:], operands, strict=True)):
            continue  # the positions depend on the inputs: combing freezes the axis
        call = Call(attributes_of(node), combed.folded.model.opset)
        axes = _axes_of(combed, scope, node.input[0])
        for number, axis in enumerate(axes):
            places = np.arange(len(axis)).reshape([-1 if other == number else 1 for other in range(len(axes))])
            with contextlib.suppress(ValueError, IndexError, TypeError):  # it picks along another axis
                results = EVALUATORS[node.op_type](call, places, *operands)
                results = results if isinstance(results, tuple) else (results,)
                for name, picked in zip(node.output, results, strict=False):
                    result = _axes_of(combed, scope, name)[number]
                    if picked.size == len(result) == picked.shape[number]:
                        yield axis, result, picked.ravel()


def _axes(combed: Combed) -> list[Axis]:
    found = {fingerprint(a): a for w in combed.weights for axes in w.axes for a in axes}
    found |= {fingerprint(a): a for t in combed.tensors.values() for a in t.all_axes}
    return [axis for axis in found.values() if not combed.atoms.all_frozen(axis)]


def _order(atoms: Atoms, axis: Axis, image: Axis) -> Axis | None:
    """Return for each position of an axis the position whose channel takes it; None if a channel finds no position."""
    parts = atoms.parts(axis)
    before, after = (np.sort(table, axis=1) for table in (parts, image[parts]))
    _, keys = np.unique(np.concatenate([before, after]), axis=0, return_inverse=True)
    places, movers = keys.ravel()[: len(axis)], keys.ravel()[len(axis) :]
    frozen = atoms.is_frozen(axis)
    places, movers = (
        np.where(frozen, -1 - np.arange(len(axis)), places),
        np.where(frozen, -1 - np.arange(len(axis)), movers),
    )
    by_place, by_mover = np.argsort(places, kind="stable"), np.argsort(movers, kind="stable")
    if not np.array_equal(places[by_place], movers[by_mover]):
        return None
    order = np.empty(len(axis), np.int64)
    order[by_place] = by_mover
    return order


def _permuted(combed: Combed, image: Axis) -> Model:
    editor = Editor(combed.folded.model.copy())
    for weight in combed.weights:
        if not weight.scope.function:
            _permute(combed, editor, weight, image)
    return editor.model


def _permute(combed: Combed, editor: Editor, weight: Weight, image: Axis) -> None:
    original, arrays = weight_array(combed.folded.model, weight), {}
    for use in weight.uses:
        array: Array = original
        for piece in combed.pieces(use.axes):
            for axis, atoms in enumerate(piece.axes):
                order = _order(combed.atoms, atoms, image)
                assert order is not None, "groups that cannot be permuted were left unchanged"
                if piece.rows == slice(None):
                    array = np.take(array, order, axis=axis)
                else:
                    array = np.array(array)
                    array[piece.rows] = np.take(array[piece.rows], order, axis=axis)
        arrays[use.use] = array
    first = next(iter(arrays.values()), original)
    if not np.array_equal(first, original):
        editor.replace(weight.value, weight.scope, np.ascontiguousarray(first))
    for slot, array in arrays.items():
        if not np.array_equal(array, first):
            editor.node(slot.scope, slot.node).input[slot.slot] = editor.add_fresh(
                f"{weight.value.name}_permuted", array
            )


def _zeroed(combed: Combed, keep: KeepMask) -> Model:
    """Return the model with its matrices and kernels zeroed at the removed channels."""
    editor = Editor(combed.folded.model.copy())
    for weight in combed.weights:
        axes = weight.axes[0]
        if weight.is_vector or not weight.is_trained or weight.scope.function:
            continue
        original = weight_array(combed.folded.model, weight)
        survives = np.ones(original.shape, np.bool_)
        for piece in combed.pieces(axes):
            for axis, atoms in enumerate(piece.axes):
                mask = keep.mask(atoms).reshape([-1 if i == axis else 1 for i in range(original.ndim)])
                survives[piece.rows] &= mask
        if not survives.all():
            editor.replace(
                weight.value, weight.scope, np.where(survives, original, zero_of(combed, weight)).astype(original.dtype)
            )
    return editor.model
