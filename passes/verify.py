"""Verify: the pruned model computes what the original computes with the deleted channels silenced."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from onnx import TensorProto

from cpd_onnx.data import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.errors import DataError, ProofError
from cpd_onnx.graph import Array, Model
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.masking import masked
from cpd_onnx.runtime import execute, open_model, working_feeds
from cpd_onnx.state import State

TOLERANCES = {"float32": 1e-4, "float64": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest relative difference by the narrowest float type of the weights; quantised models get `QUANTIZED`."""
QUANTIZED = 5e-2
"""Median over the inputs of the root mean square instead: where sums are taken in another order, rounding may fall to
the other side, which deep networks amplify."""


@dataclass(frozen=True)
class Verification:
    """Outcome of the mask check.

    Attributes:
        difference: largest difference of any output between the pruned model and the masked original, relative to the
            largest value of that output.
        tolerance: what it may be.
        runs: sets of inputs tried.
        effect: the same between the pruned model and the original as it is: how much was there to see.

    """

    difference: float
    tolerance: float
    runs: int
    effect: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


def verify(
    combed: Combed, kept: Kept, pruned: Model, feeds: Iterable[Mapping[str, Array]] | None = None
) -> Verification:
    """Compare the pruned model with the masked original in onnxruntime, optimisations off.

    Runs on random inputs if none are given. Raises UnsupportedError if onnxruntime cannot run the models.
    """
    models = (combed.folded.model, masked(combed, kept, pruned), pruned)
    original, reference, smaller = (open_model(model, optimise=False) for model in models)
    effect, allowed = 0.0, tolerance(combed)
    is_quantized = allowed == QUANTIZED
    measure = root_mean_square if is_quantized else relative
    if feeds is None:
        feeds = working_feeds(combed.folded, original, 5 if is_quantized else 2)
    differences: list[float] = []
    for feed in feeds:
        differences.append(0.0)
        outputs = [execute(session, feed) for session in (original, reference, smaller)]
        if any(o.dtype.kind == "f" and np.isnan(o).any() for o in outputs[0]):
            raise DataError("the original gives NaN on the inputs that were tried: give real data with --data")
        for first, expected, got in zip(*outputs, strict=True):
            differences[-1] = max(differences[-1], measure(expected, got))
            effect = max(effect, relative(first, got))
    if not differences:
        raise DataError("there is no input to verify on")
    difference = float(np.median(differences)) if is_quantized else max(differences)
    return Verification(difference, allowed, len(differences), effect)


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


def proved(found: Verification) -> Verification:
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


def root_mean_square(expected: Array, got: Array) -> float:
    """Root mean square of the difference relative to that of the expected values."""
    if expected.shape != got.shape or expected.dtype.kind not in "fiu":
        return relative(expected, got)
    a, b = expected.astype(np.float64), got.astype(np.float64)
    scale = float(np.sqrt(np.mean(a**2))) if a.size else 0.0
    largest = float(np.sqrt(np.mean((a - b) ** 2))) if a.size else 0.0
    return largest / scale if scale > 0 else (0.0 if largest == 0 else float("inf"))


def relative(expected: Array, got: Array) -> float:
    """Largest difference relative to the largest value; infinite where shapes or finiteness differ."""
    if expected.shape != got.shape:
        return float("inf")
    if expected.dtype.kind not in "fiub" or not expected.size:
        return 0.0 if np.array_equal(expected, got) else float("inf")
    a, b = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    if not finite.any():
        return float("inf")
    scale = float(np.abs(a[finite]).max())
    largest = float(np.abs(a[finite] - b[finite]).max())
    return largest / scale if scale > 0 else (0.0 if largest == 0 else float("inf"))


def tolerance(combed: Combed) -> float:
    """What the narrowest number format in the model allows."""
    kinds = {weight.value.dtype for weight in combed.weights if weight.is_float and weight.size > 1}
    activations = {t.value.dtype for t in combed.tensors.values()}
    if activations & {TensorProto.INT8, TensorProto.UINT8}:
        return QUANTIZED
    names = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    return max((TOLERANCES[names.get(kind, "float32")] for kind in kinds), default=1e-4)
