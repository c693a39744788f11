"""Whether two models compute the same: how far apart their outputs are, and how far rounding alone would drive them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from cpd_onnx.errors import DataError
from cpd_onnx.graph import Array
from cpd_onnx.groups import Combed
from cpd_onnx.runtime import Feed, Runner, execute_all

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest relative difference by the narrowest float type of the weights; quantised models get `QUANTIZED`."""
QUANTIZED = 5e-2
"""Median over the inputs of the root mean square instead: where sums are taken in another order, rounding may fall to
the other side, which deep networks amplify."""
_PIECE = 1 << 20
"""Elements that are compared at a time."""
_NUDGE = 1e-6
"""Relative change of float inputs, of the size of a few roundings, that shows how much a model amplifies them."""
_MARGIN = 10.0
"""Two models that differ by less than this many times what a nudge does are taken for the same."""


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart.

    Attributes:
        difference: largest difference of any output, relative to the largest value of that output.
        tolerance: what it may be for the number formats in the model.
        noise: the same for the reference alone when its inputs change by a few roundings.
        runs: sets of inputs tried.
        effect: the same between the original and the second model: how much was there to see.

    """

    difference: float
    tolerance: float
    noise: float
    runs: int
    effect: float = 0.0

    @property
    def allowed(self) -> float:
        """The tolerance, or what rounding explains where that is more."""
        return max(self.tolerance, _MARGIN * self.noise)

    @property
    def passed(self) -> bool:
        """Whether the difference is no more than is allowed."""
        return self.difference <= self.allowed

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from cpd_onnx import report  # which stands above

        return report.as_html(report.comparison_table(self))


def compare(
    plain: Sequence[Sequence[Array]],
    reference: Runner,
    other: Runner,
    feeds: Sequence[Mapping[str, Array]],
    allowed: float,
) -> Comparison:
    """Run two models: `other` should equal `reference`.

    `plain` is what the original gives for each of the inputs: the scale of the outputs. Raises DataError if there is
    NaN in it, or there are no inputs.
    """
    if not feeds:
        raise DataError("there is no input to compare on")
    if any(o.dtype.kind == "f" and np.isnan(o).any() for outputs in plain for o in outputs):
        raise DataError("the original gives NaN on the inputs that were tried: give real data with --data")
    is_quantized = allowed == QUANTIZED
    expected = execute_all(reference, [*feeds, *map(_nudged, feeds)])
    found = zip(plain, expected[: len(feeds)], execute_all(other, feeds), expected[len(feeds) :], strict=True)
    differences, noise, effect = [], 0.0, 0.0
    for outputs in found:
        quadruples = list(zip(*outputs, strict=True))
        differences.append(max((distance(b, c, a, rms=is_quantized) for a, b, c, _ in quadruples), default=0.0))
        effect = max([effect, *(distance(a, c, a) for a, _, c, _ in quadruples)])
        noise = max([noise, *(distance(b, n, a) for a, b, _, n in quadruples)])
    difference = float(np.median(differences)) if is_quantized else max(differences)
    return Comparison(difference, allowed, noise, len(differences), effect)


def distance(expected: Array, got: Array, scale_of: Array, *, rms: bool = False) -> float:
    """Largest (or root mean square) difference, relative to that of the larger of `expected` and `scale_of`.

    Infinite where shapes or finiteness differ, or nothing is finite.
    """
    if expected.shape != got.shape:
        return float("inf")
    if expected.dtype.kind not in "fiub" or not expected.size:
        return 0.0 if np.array_equal(expected, got) else float("inf")
    apart, size, scale = _Extent(), _Extent(), _Extent()
    for a, b in zip(_pieces(expected), _pieces(got), strict=True):
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            return float("inf")
        size.add(a[finite])
        apart.add(a[finite] - b[finite])
    if not size.count:
        return float("inf")
    for c in () if rms else _pieces(scale_of):
        scale.add(c[np.isfinite(c)])
    if rms:
        return _ratio(apart.rms, size.rms)
    return _ratio(apart.largest, max(size.largest, scale.largest))


class _Extent:
    """How large some numbers are, which are seen a piece at a time: outputs can be large."""

    def __init__(self) -> None:
        self.largest, self.squares, self.count = 0.0, 0.0, 0

    def add(self, values: Array) -> None:
        if values.size:
            self.largest = max(self.largest, float(np.abs(values).max()))
            self.squares += float(np.square(values).sum())
            self.count += values.size

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


def _pieces(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    return (flat[start : start + _PIECE].astype(np.float64) for start in range(0, flat.size, _PIECE))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else float("inf"))


def tolerance(combed: Combed) -> float:
    """What the narrowest number format in the model allows."""
    activations = {t.value.dtype for t in combed.tensors.values()}
    if combed.recorder.is_rounding or activations & {TensorProto.INT8, TensorProto.UINT8}:
        return QUANTIZED
    names: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    kinds = {weight.value.dtype for weight in combed.weights if weight.is_float and weight.size > 1}
    return max((TOLERANCES[names.get(kind, "float32")] for kind in kinds), default=TOLERANCES["float32"])


def runs_needed(allowed: float) -> int:
    """Sets of random inputs to try."""
    return 5 if allowed == QUANTIZED else 2


def _nudged(feed: Mapping[str, Array]) -> Feed:
    rng = np.random.default_rng(0)
    return {
        name: (array * (1 + _NUDGE * rng.standard_normal(array.shape))).astype(array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in feed.items()
    }
