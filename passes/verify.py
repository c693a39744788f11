"""Verify: the pruned model computes what the original computes with the removed channels masked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.compare import Comparison
from cpd_onnx.data import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.deploy import Difference as OutputDifference
from cpd_onnx.graph import Array, Model
from cpd_onnx.kept import Kept
from cpd_onnx.passes.comb import planned
from cpd_onnx.plan import Plan
from cpd_onnx.proving import proved, runner_of, verify
from cpd_onnx.replayed import measured, require_replay, same_bytes
from cpd_onnx.rewrite import rewrite
from cpd_onnx.state import State


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
    InconclusiveError if the comparison shows too little, unless it is allowed to.
    """
    combed, kept = planned(original, plan)
    replay = rewrite(combed, kept, plan.input_shapes).model
    plan.stamp(replay)
    require_replay(replay, pruned, plan)
    given = None if feeds is None else list(feeds)
    trained = tuple(plan.values)
    found = verify(combed, kept, replay if trained else pruned, given)
    comparison = proved(found, allow_inconclusive=allow_inconclusive)
    if not trained:
        return FileVerification(True, trained, comparison, same_bytes(replay, pruned))
    apart = measured(combed.folded, pruned, given, runner_of(combed))
    return FileVerification(False, trained, comparison, False, apart)
