"""Whether a pruned file is what a plan makes of its original, and computes what it should."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cpd_onnx.data.sources import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof.comparison import Comparison
from cpd_onnx.proof.comparison import Difference as OutputDifference
from cpd_onnx.proof.proving import proved, runner_of, verify
from cpd_onnx.proof.replayed import measured, require_replay, same_bytes
from cpd_onnx.rewrite.plan import Plan, planned
from cpd_onnx.rewrite.rewriter import rewrite


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
    combed, keep = planned(original, plan)
    replay = rewrite(combed, keep).model
    plan.stamp(replay)
    require_replay(replay, pruned, plan)
    given = None if feeds is None else list(feeds)
    trained = tuple(plan.values)
    found = verify(combed, keep, replay if trained else pruned, given)
    comparison = proved(found, allow_inconclusive=allow_inconclusive)
    if not trained:
        return FileVerification(True, trained, comparison, same_bytes(replay, pruned))
    apart = measured(combed.folded, pruned, given, runner_of(combed))
    return FileVerification(False, trained, comparison, False, apart)
