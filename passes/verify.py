"""Verify: the pruned model computes what the original computes with the removed channels masked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from cpd_onnx.compare import TOLERANCES, Comparison, runs_needed
from cpd_onnx.data import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.deploy import Difference as OutputDifference
from cpd_onnx.deploy import output_difference
from cpd_onnx.differences import differences, named_places
from cpd_onnx.errors import ProofError, UnsupportedError
from cpd_onnx.graph import Array, Model
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.passes.comb import planned
from cpd_onnx.plan import Plan
from cpd_onnx.proof_inputs import proof_inputs
from cpd_onnx.proving import proved, runner_of, verify
from cpd_onnx.rewrite import rewrite
from cpd_onnx.runtime import execute_all
from cpd_onnx.state import State
from cpd_onnx.tensors import Stored, same_bits, stored_tensors, values_sha256

_NO_VALUES = (
    "; the plan names no refitted or trained weights (if it was written before plans named them, repair or distill "
    "again)"
)


@dataclass(frozen=True)
class Verify:
    """Prove that the pruned model computes what the masked original computes.

    Where weights have been given other values since, that is shown of what the plan makes of the original; all else
    must be the same, and these weights must be those that the plan names. `batches` batches of the data are used where
    there is data, random inputs otherwise. `allow_inconclusive` accepts a model of which these inputs show too little
    to say that it is right or wrong.
    """

    batches: int = 2
    allow_inconclusive: bool = False
    name: ClassVar[str] = "verify"

    def __call__(self, state: State) -> State:
        """Fill in `verification`; raises ProofError if the model is wrong, InconclusiveError if nothing is shown."""
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        feeds = None if state.data is None else data_feeds(state.original, state.data, self.batches)
        if state.repaired is not None or state.distilled is not None:
            plan = state.need("plan", "prune")
            checked = verify_files(state.original, state.model, plan, feeds, allow_inconclusive=self.allow_inconclusive)
            return replace(state, verification=checked.comparison)
        kept = Kept(combed.atoms)
        kept.remove(chosen.channels(combed))
        found = verify(combed, kept, state.model, feeds)
        return replace(state, verification=proved(found, allow_inconclusive=self.allow_inconclusive))


def data_feeds(model: Model, source: Source, batches: int) -> Iterator[Batch]:
    """The first batches of a source, without labels."""
    inputs = inputs_of(model.proto)
    size = None if source.count is None else fixed_batch(inputs)  # whole feeds are as large as they are
    for batch in itertools.islice(source.batches(size or 2), batches):
        if size is None or all(len(array) == size for array in batch.values() if array.ndim):
            yield {entry.name: batch[entry.name] for entry in inputs}


@dataclass(frozen=True)
class FileVerification:
    """Outcome of checking a pruned file against its original and its plan.

    Attributes:
        is_replay: whether all values in the file are those that the plan makes of the original.
        trained: weights that the plan names as refitted or trained, in order; they have the SHA-256 that it says.
        comparison: the mask check, of the file itself or, where weights were refitted or trained, of the replay.
        same_bytes: whether the file is the replay byte for byte; otherwise it may store the same values differently.
        measured: how far outputs of the file are from the original's, where weights were refitted or trained.

    """

    is_replay: bool
    trained: tuple[str, ...]
    comparison: Comparison
    same_bytes: bool = False
    measured: OutputDifference | None = None


def verify_files(
    original: Model,
    pruned: Model,
    plan: Plan,
    feeds: Iterable[Mapping[str, Array]] | None = None,
    *,
    allow_inconclusive: bool = False,
) -> FileVerification:
    """Check that a file is what a plan makes of an original, and that this computes what it should.

    Every value, attribute and description in the file must be what the plan makes of the original. Weights that the
    plan names as refitted or trained must have the SHA-256 that it says and be finite. Where there are none, the file
    itself is compared with the masked original. Where there are some, that is done with the replay, and the file must
    run and give finite outputs of the original's shapes.

    Raises PlanError if the plan belongs to another original, ProofError if the file is something else or a check fails,
    InconclusiveError if the inputs show too little, unless they are allowed to.
    """
    combed, kept = planned(original, plan)
    replay = rewrite(combed, kept, plan.input_shapes).model
    plan.stamp(replay)
    _require_replay(replay, pruned, plan)
    given = None if feeds is None else list(feeds)
    trained = tuple(plan.values)
    found = verify(combed, kept, replay if trained else pruned, given)
    comparison = proved(found, allow_inconclusive=allow_inconclusive)
    measured = _measured(combed, pruned, given) if trained else None
    return FileVerification(not trained, trained, comparison, not trained and _same_bytes(replay, pruned), measured)


def _require_replay(replay: Model, pruned: Model, plan: Plan) -> None:
    """Raise ProofError, with the first place, where a file is not what the plan makes of the original."""
    named = plan.values
    odd: list[str] = []
    is_value = False
    for found in differences(replay, pruned):
        if found.tensor not in named:
            is_value = is_value or (not odd and bool(found.tensor))
            odd.append(str(found))
    odd = odd or _wrong_values(replay, pruned, named)
    if odd:
        more = f" (and {len(odd) - 1} more differences)" if len(odd) > 1 else ""
        why = _NO_VALUES if is_value and not named else ""
        raise ProofError(f"the file is not what the plan makes of the original: {odd[0]}{more}{why}")


def _wrong_values(replay: Model, pruned: Model, named: Mapping[str, str]) -> list[str]:
    """Weights that the plan names as refitted or trained, and that are not what it says."""
    ours, theirs = stored_tensors(replay), stored_tensors(pruned)
    found = ((name, _wrong(ours.get(name), theirs.get(name), digest)) for name, digest in named.items())
    odd = {name: why for name, why in found if why}
    places = named_places(replay) if odd else {}
    return [f"{places.get(name, f'weight {name!r}')}: {why}" for name, why in odd.items()]


def _wrong(ours: Stored | None, theirs: Stored | None, digest: str) -> str:
    """What is wrong with a weight that the plan names as refitted or trained; empty if nothing is."""
    if ours is None or theirs is None:
        return "the plan names it as refitted or trained, and it is not in the file"
    values, before = theirs.array(), ours.array()
    if values.dtype.kind in "OSU":
        return "the plan names it as refitted or trained, and it is text"
    found = values_sha256(theirs.data_type, values)
    if found != digest:
        said = "the values from before the repair or training" if same_bits(before, values) else "other values"
        return f"it has {said}: their SHA-256 is {found[:12]}…, the plan names {digest[:12]}…"
    return "" if _is_finite(values, before) else "it was refitted or trained to values that are not finite"


def _is_finite(values: Array, before: Array) -> bool:
    """Whether values are finite wherever they were before."""
    kinds = [array.astype(np.float64) if array.dtype.kind in "fV" else array for array in (values, before)]
    return bool((np.isfinite(kinds[0]) | ~np.isfinite(kinds[1])).all())


def _same_bytes(replay: Model, pruned: Model) -> bool:
    if replay.is_over_limit or pruned.is_external:
        return False
    return replay.sha256() == pruned.sha256()


def _measured(combed: Combed, pruned: Model, feeds: list[Mapping[str, Array]] | None) -> OutputDifference:
    """How far outputs of a file are from the original's; ProofError if it does not run or gives something else."""
    model, runner = combed.folded.original, runner_of(combed)
    original = runner(model)
    given = feeds or list(
        proof_inputs(combed.folded, original, runs_needed(TOLERANCES["float32"]), observe=False).feeds
    )
    plain = execute_all(original, given)
    del original
    try:
        found = execute_all(runner(pruned), given)
    except UnsupportedError as error:
        raise ProofError(f"onnxruntime runs the original but not the file: {error}") from error
    for ours, theirs in zip(plain, found, strict=True):
        for info, a, b in zip(model.graph.output, ours, theirs, strict=True):
            _require_alike(info.name, a, b)
    return output_difference(plain, found)


def _require_alike(name: str, expected: Array, got: Array) -> None:
    """Raise ProofError where an output has another type or shape than expected, or is not finite where it should be."""
    if expected.dtype != got.dtype or expected.shape != got.shape:
        raise ProofError(
            f"output {name!r} of the file is {got.dtype}{list(got.shape)}, "
            f"the original's is {expected.dtype}{list(expected.shape)}"
        )
    if not _is_finite(got, expected):
        raise ProofError(f"output {name!r} of the file is not finite where the original's is")
