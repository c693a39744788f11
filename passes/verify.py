"""Verify: the pruned model computes what the original computes with the deleted channels silenced."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.compare import Comparison, compare, runs_needed, tolerance
from cpd_onnx.data import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.errors import ProofError
from cpd_onnx.graph import Array, Model
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.masking import masked
from cpd_onnx.runtime import open_model, working_feeds
from cpd_onnx.state import State

def verify(
    combed: Combed, kept: Kept, pruned: Model, feeds: Iterable[Mapping[str, Array]] | None = None
) -> Comparison:
    """Compare the pruned model with the masked original in onnxruntime, optimisations off.

    Runs on random inputs if none are given. Raises UnsupportedError if onnxruntime cannot run the models, DataError if
    the original gives NaN.
    """
    models = (combed.folded.model, masked(combed, kept, pruned), pruned)
    original, reference, smaller = (open_model(model, optimise=False) for model in models)
    allowed = tolerance(combed)
    if feeds is None:
        feeds = working_feeds(combed.folded, original, runs_needed(allowed))
    return compare(original, reference, smaller, feeds, allowed)


@dataclass(frozen=True)
class Verify:
    """Prove that the pruned model computes what the masked original computes.

    `batches` batches of the data are used where there is data, random inputs otherwise.
    """

    batches: int = 2
    name: ClassVar[str] = "verify"

    def __call__(self, state: State) -> State:
        """Fill in `verification`; raises ProofError if the proof fails."""
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        kept = Kept(combed.atoms)
        kept.remove(chosen.channels(combed))
        feeds = None if state.data is None else data_feeds(state.original, state.data, self.batches)
        return replace(state, verification=proved(verify(combed, kept, state.model, feeds)))


def proved(found: Comparison) -> Comparison:
    """The verification if it passed; raises ProofError otherwise."""
    if not found.passed:
        raise ProofError(
            f"the pruned model differs from the masked original by {found.difference:.2g} (allowed {found.tolerance:.0e}); "
            "nothing is written. This is a defect of ours: please report it with the model"
        )
    return found


def data_feeds(model: Model, source: Source, batches: int) -> Iterator[Batch]:
    """The first batches of a source, without labels."""
    inputs = inputs_of(model.proto)
    size = fixed_batch(inputs) or 2
    for batch in itertools.islice(source.batches(size), batches):
        if all(len(array) == size for array in batch.values() if array.ndim):
            yield {entry.name: batch[entry.name] for entry in inputs}
