"""Comparison of a file with its replay, the original with the plan applied, and of its outputs with the original's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cpd_onnx.errors import ProofError, UnsupportedError
from cpd_onnx.ir.differences import differences, named_places
from cpd_onnx.ir.interface import cut, kept_by
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ir.tensors import StoredTensor, same_bits, stored_tensors, values_sha256
from cpd_onnx.proof.comparison import TOLERANCES, OutputDifference, output_difference, runs_needed
from cpd_onnx.proof.inputs import proof_inputs
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.sessions import Runner, execute_all
from cpd_onnx.shapes.values import Folded

_NO_VALUES = (
    "; the plan names no refitted or trained weights (if it was written before plans named them, repair or distill "
    "again)"
)
"""Advice after a message about a weight with other values, where the plan names no weights."""


def require_replay(replay: Model, pruned: Model, plan: Plan) -> None:
    """Raise ProofError, which names the first difference, if a file differs from its replay."""
    named = plan.values
    unplanned = [found for found in differences(replay, pruned) if found.tensor not in named]
    wrong = [str(found) for found in unplanned] or _wrong_values(replay, pruned, named)
    if wrong:
        more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
        advice = _NO_VALUES if unplanned and unplanned[0].tensor and not named else ""
        raise ProofError(f"the file is not what the plan makes of the original: {wrong[0]}{more}{advice}")


def _wrong_values(replay: Model, pruned: Model, named: Mapping[str, str]) -> list[str]:
    """Return a sentence for each weight that the plan names as refitted or trained and that differs from it."""
    ours, theirs = stored_tensors(replay), stored_tensors(pruned)
    found = ((name, _wrong(ours.get(name), theirs.get(name), digest)) for name, digest in named.items())
    wrong = {name: why for name, why in found if why}
    places = named_places(replay) if wrong else {}
    return [f"{places.get(name, f'weight {name!r}')}: {why}" for name, why in wrong.items()]


def _wrong(ours: StoredTensor | None, theirs: StoredTensor | None, digest: str) -> str:
    """Return what is wrong with a weight that the plan names as refitted or trained; empty if nothing is."""
    if ours is None or theirs is None:
        return "the plan names it as refitted or trained, but the file does not have it"
    values, before = theirs.array(), ours.array()
    if values.dtype.kind in "OSU":
        return "the plan names it as refitted or trained, but its elements are text"
    found = values_sha256(theirs.data_type, values)
    if found != digest:
        state = "the values from before the repair or training" if same_bits(before, values) else "other values"
        return f"it has {state}: their SHA-256 is {found[:12]}…, the plan names {digest[:12]}…"
    return "" if _is_finite(values, before) else "it was refitted or trained to values that are not finite"


def _is_finite(values: Array, before: Array) -> bool:
    """Return whether values are finite wherever they were before."""
    kinds = [array.astype(np.float64) if array.dtype.kind in "fV" else array for array in (values, before)]
    return bool((np.isfinite(kinds[0]) | ~np.isfinite(kinds[1])).all())


def same_bytes(replay: Model, pruned: Model) -> bool:
    """Return whether a file equals the replay byte for byte, given that their values are equal."""
    if replay.is_over_limit or pruned.is_external:
        return False
    return replay.sha256() == pruned.sha256()


def measured(
    folded: Folded,
    pruned: Model,
    feeds: Sequence[Mapping[str, Array]] | None,
    runner: Callable[[Model], Runner],
) -> OutputDifference:
    """Return the difference between outputs of a file and of the original, on random inputs if none are given.

    Raises ProofError if the file does not run, or its outputs have other types or shapes, or are not finite where the
    original's are.
    """
    original = runner(folded.original)
    count = runs_needed(TOLERANCES["float32"])
    given = feeds or proof_inputs(folded, original, count, is_large=True).feeds
    try:
        plain = execute_all(original, given)
    except UnsupportedError:
        if feeds:
            raise
        # indices may lie beyond an axis of another input, which shapes do not tell
        given = proof_inputs(folded, original, count).feeds
        plain = execute_all(original, given)
    del original  # frees its memory before the other session is opened
    try:
        found = execute_all(runner(pruned), given)
    except UnsupportedError as error:
        raise ProofError(f"onnxruntime runs the original but not the file: {error}") from error
    kept, names = kept_by(pruned), [info.name for info in folded.model.graph.output]
    plain = [[cut(a, kept.get(name, {})) for name, a in zip(names, each, strict=True)] for each in plain]
    for ours, theirs in zip(plain, found, strict=True):
        for name, a, b in zip(names, ours, theirs, strict=True):
            _require_alike(folded, name, a, b)
    return output_difference(plain, found)


def _require_alike(folded: Folded, name: str, expected: Array, got: Array) -> None:
    """Raise ProofError if type, rank, known shape or finiteness of an output differ from the original's."""
    value = folded.scope.values.get(name)
    is_known = value is not None and not value.depends_on_values
    if expected.dtype != got.dtype or expected.ndim != got.ndim or (is_known and expected.shape != got.shape):
        raise ProofError(
            f"output {name!r} of the file is {got.dtype}{list(got.shape)}, "
            f"the original's is {expected.dtype}{list(expected.shape)}"
        )
    if expected.dtype.kind in "OSU" or expected.shape != got.shape:
        return
    if not _is_finite(got, expected):
        raise ProofError(f"output {name!r} of the file is not finite where the original's is")
