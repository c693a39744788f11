"""Outcome of a random graph with open sizes: it is pruned, with and without whole branches, proved, and compared at sizes
that neither step used."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Allocation, Budget, allocate
from cpd_onnx.channels.combing import at_sizes, comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ops.sizes import Term
from cpd_onnx.passes.prune import prune
from cpd_onnx.proof.comparison import nudged
from cpd_onnx.proof.inputs import is_feasible, numbers_in
from cpd_onnx.proof.masking import is_bound_to_sizes, masked
from cpd_onnx.proof.proving import verify
from cpd_onnx.runtime.sessions import Feed, Runner, execute, open_model
from cpd_onnx.scores.registry import score
from cpd_onnx.shapes.values import Folded
from cpd_onnx.testing import without_branches
from tests.support.open_graphs import seeded

BINDINGS, TRIES = 5, 30
"""Number of sets of sizes for the comparison, and of attempts to find as many that the original accepts."""
_SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 16)
_SYMBOLS = ("n", "n2", "h", "h2", "w", "t", "s")


def open_outcome(seed: int) -> str:
    """Return the outcome of the graph of a seed."""
    return outcome_of(seeded(seed), seed)


def outcome_of(model: ModelProto, seed: int) -> str:
    """Return the outcome of a model; it starts with capitals if a wrong file was accepted."""
    try:
        session = open_model(model, optimise=False)
    except cpd.UnsupportedError:
        return "not a model"
    combed = comb(cpd.load(model))
    tried = list(_accepted(model, combed.folded, session, random.Random(seed)))
    if not tried:
        return "runs at none of these sizes"
    try:
        chosen = allocate(combed, score(combed, "random", seed=seed), Budget("channels", 0.5))
    except cpd.TargetError:
        return "nothing to prune"
    deep, gone = without_branches(combed, chosen, 0.5, seed)
    outcome = _pruned(combed, chosen, tried)
    if not gone or outcome != "right":
        return outcome
    without = _pruned(combed, deep, tried)
    return without if without == outcome else f"{without}, without whole branches"


def _pruned(combed: Combed, chosen: Allocation, tried: list[Feed]) -> str:
    """Return the outcome of one allocation."""
    pruned = prune(combed, chosen).model
    kept = chosen.keep_mask(combed)
    try:
        found = verify(combed, kept, pruned)
    except cpd.UnsupportedError:
        return "refused, the original does not run at the sizes that are tried"
    if not found.passed:
        return f"not written, {found.verdict}: {'; '.join(found.notes)} {found.difference:.1e}"
    return compared(combed, kept, pruned, tried)


def compared(combed: Combed, kept: KeepMask, pruned: Model, feeds: list[Feed]) -> str:
    """Compare the outputs of a pruned model with those of the masked original and return the outcome."""
    smaller, is_bound = open_model(pruned, optimise=False), is_bound_to_sizes(combed, kept)
    reference = None if is_bound else open_model(masked(combed, kept, pruned), optimise=False)
    for feed in feeds:
        shapes = {name: array.shape for name, array in feed.items()}
        here = at_sizes(combed, kept, numbers_in(combed.folded, feed)) if is_bound else None
        if is_bound and here is None:
            if any(1 in shape for shape in shapes.values()):
                continue  # an axis of one index makes other channels the only ones
            return f"WRONG: other channels are coupled at {shapes}"
        with_masks = reference or open_model(masked(*here, pruned), optimise=False)  # type: ignore[misc]  # not None
        try:
            found = execute(smaller, feed)
        except cpd.UnsupportedError as error:
            return f"WRONG: the pruned file fails at {shapes}: {error}"
        expected = execute(with_masks, feed)
        if all(map(_alike, expected, found)):
            continue
        if not all(map(_apart_by_rounding, expected, found, execute(with_masks, nudged([feed])[0]))):
            return f"WRONG at {shapes}"
    return "right"


def _accepted(model: ModelProto, folded: Folded, session: Runner, rng: random.Random) -> Iterator[Feed]:
    """Yield inputs of random sizes on which the original runs deterministically."""
    count = 0
    for number in range(TRIES):
        sizes = {name: rng.choice(_SIZES) for name in _SYMBOLS}
        if not is_feasible(
            folded, {Term("symbol", (key,)): sizes[key.lower()] for key in _symbols(model) if key.lower() in sizes}
        ):
            continue
        feed = {}
        for info in model.graph.input:
            shape = [sizes.get(dim.dim_param.lower(), dim.dim_value) for dim in info.type.tensor_type.shape.dim]
            values = (100.0 if number % 2 else 1.0) * np.random.default_rng(number).standard_normal(shape)
            feed[info.name] = np.asarray(values).astype(
                helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            )
        try:
            first, again = (execute(session, feed) for _ in range(2))
        except cpd.UnsupportedError:
            continue
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, again, strict=True)):
            yield feed
            count += 1
        if count == BINDINGS:
            return


def _apart_by_rounding(expected: Array, got: Array, nudged_: Array) -> bool:
    """Whether a change of the inputs by a few roundings changes the outputs of a chaotic model as much."""
    if _alike(expected, got):
        return True
    return expected.shape == got.shape and float(np.abs(expected - got).max()) <= 10 * float(
        np.abs(expected - nudged_).max()
    )


def _symbols(model: ModelProto) -> set[str]:
    return {dim.dim_param for info in model.graph.input for dim in info.type.tensor_type.shape.dim}


def _alike(expected: Array, got: Array) -> bool:
    if expected.shape != got.shape:
        return False
    largest = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
    return np.allclose(expected, got, rtol=1e-3, atol=1e-4 * (1 + largest), equal_nan=True)
