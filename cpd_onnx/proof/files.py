"""Verification of a pruned file against its original and its plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cpd_onnx.data.sources import Batch, Source, fixed_batch, run_inputs
from cpd_onnx.io.progress import step
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof.comparison import Comparison, OutputDifference
from cpd_onnx.proof.proving import proved, runner_of, verify
from cpd_onnx.proof.replayed import measured, require_replay, same_bytes
from cpd_onnx.rewrite.plan import Plan, planned
from cpd_onnx.rewrite.rewriter import rewrite


def data_feeds(model: Model, source: Source, batches: int) -> Iterator[Batch]:
    """Yield the first batches of a source, without labels."""
    inputs = run_inputs(model)
    size = None if source.count is None else fixed_batch(inputs)  # a source of whole feeds sets their size
    for batch in itertools.islice(source.batches(size or 2), batches):
        if size is None or all(len(array) == size for array in batch.values() if array.ndim):
            yield {entry.name: entry.taken(batch[entry.name]) for entry in inputs}


@dataclass(frozen=True)
class FileVerification:
    """Outcome of checking a pruned file against its original and its plan.

    Attributes:
        is_replay: Whether all values in the file are those of the replay, the original with the plan applied.
        trained: Names of weights that were refitted or trained; they have the SHA-256 that the plan records.
        comparison: The mask check, of the file itself or, where weights were refitted or trained, of the replay.
        same_bytes: Whether the file equals the replay byte for byte; it may store the same values differently.
        measured: Difference between the outputs of the file and of the original; None without trained weights.

    """

    is_replay: bool
    trained: tuple[str, ...]
    comparison: Comparison
    same_bytes: bool = False
    measured: OutputDifference | None = None


@step("verify")
def verify_files(
    original: Model,
    pruned: Model,
    plan: Plan,
    feeds: Iterable[Mapping[str, Array]] | None = None,
    *,
    allow_inconclusive: bool = False,
) -> FileVerification:
    """Verify that a file is its original with a plan applied, and that it equals the masked original.

    Every value, attribute and shape entry of the file must be that of the replay, the original with the plan applied.
    Weights that the plan names as refitted or trained must be finite and have the SHA-256 that it records. Without such
    weights, the file itself is compared with the masked original; with them, the replay is, and the file must run and
    give finite outputs of the original's shapes.

    Raises PlanError if the plan belongs to another original, ProofError if the file differs or a check fails, and
    InconclusiveError if the comparison is inconclusive, unless that is allowed.
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
    difference = measured(combed.folded, pruned, given, runner_of(combed))
    return FileVerification(False, trained, comparison, False, difference)
