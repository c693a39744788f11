"""Comparison of the outputs of two models, and its verdict.

Three verdicts. *Verified*: each output agrees to within its tolerance, and the difference is at most a hundredth of the
effect of the removed channels, so that an error in their removal would have shown. *Wrong*: some output differs by more
than rounding explains. *Inconclusive*: neither holds on these inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from cpd_onnx.algebra.atoms import Mask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import DataError
from cpd_onnx.ir.model import Array, element_type
from cpd_onnx.runtime.sessions import Feed, Runner, execute_all
from cpd_onnx.summary import Summarised, Summary

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest allowed difference, relative to the largest value of an output, by the narrowest float type of the weights; a
heuristic, some hundred roundings of each type. Quantised models get `QUANTIZED`."""
QUANTIZED = 5e-2
"""Allowed difference of models that round to integers (heuristic): the median over the inputs of the relative root mean
square, as another order of summation may flip roundings, which deep networks amplify."""
VERIFIED, INCONCLUSIVE, WRONG = "verified", "inconclusive", "wrong"
"""The verdicts of a comparison."""
VERDICTS = (VERIFIED, INCONCLUSIVE, WRONG)
"""All verdicts, best first."""
VALUES, SATURATING, DISCRETE = "values", "saturating", "discrete"
"""Kinds of compared tensors: numbers; numbers after a non-linearity that may saturate; decisions (an ArgMax, an index),
which change in steps and are compared by the fraction of equal elements."""
_PIECE = 1 << 20
"""Number of elements compared at a time, to bound memory (8 MB as float64)."""
_NUDGE = 1e-6
"""Standard deviation of the relative change of inputs that measures how much a model amplifies rounding: about eight
roundings of a float32 (heuristic)."""
_MARGIN = 10.0
"""Multiple of the effect of such a change below which a difference counts as rounding (heuristic)."""
_OF_EFFECT = 0.01
"""Largest difference of two models as a fraction of the effect of the removed channels (heuristic)."""
_LEAST_EFFECT = 100 * 2.0**-23
"""Smallest relative effect that proves something: a hundredth of it is one rounding of a float32 (2^-23)."""
_FLIPPED = 1e-3
"""Fraction of decisions that may differ because two candidates are nearly equal (heuristic)."""
_CHANGES = 16
"""Largest number of changes of the inputs that measure how many decisions rounding turns: a tie turns at some only
(heuristic)."""

_MOST_BRANCHES = 4
"""Number of branches that are listed by name."""

Outputs: TypeAlias = Sequence[Sequence[Array]]
"""The compared tensors, for each set of inputs."""


@dataclass(frozen=True, eq=False)
class ComparedTensor:
    """A tensor that is compared.

    Attributes:
        name: Name of the tensor, the same in all models.
        output: Graph output that it is compared for: itself, or one computed from it.
        kind: `VALUES`, `SATURATING` or `DISCRETE`.
        is_affected: Whether it depends on a sum that channels were removed from.
        is_behind: Whether it depends on any tensor that channels were removed from.
        masks: Surviving indices of its own pruned axes, by axis.
        offset: Size that its values are rounded as if they had, at least: that of the constant which the function that
            computes them subtracts from.

    """

    name: str
    output: str
    kind: str = VALUES
    is_affected: bool = False
    is_behind: bool = False
    masks: Mapping[int, Mask] = field(default_factory=dict)
    offset: float = 0.0

    def surviving(self, array: Array) -> Array:
        """Return the surviving part of the tensor of a model of the original size."""
        for axis, mask in self.masks.items():
            array = np.compress(mask, array, axis=axis)
        return array


@dataclass(frozen=True)
class Finding:
    """Result for one compared tensor; numbers are relative to its largest value.

    Attributes:
        output: Graph output.
        tensor: The compared tensor: the output itself, or one that it is computed from.
        kind: Kind of the tensor, see `ComparedTensor`.
        difference: Difference between the masked original and the pruned model.
        allowed: Largest allowed difference.
        effect: Difference between the original and the masked original.
        power: Difference that masking as many other channels makes; None if it was not needed.
        noise: Difference that changing the inputs by a few roundings makes; None if it was not needed.
        verdict: One of `VERDICTS`.

    """

    output: str
    tensor: str
    kind: str
    difference: float
    allowed: float
    effect: float
    power: float | None
    noise: float | None
    verdict: str


@dataclass(frozen=True, repr=False)
class Comparison(Summarised):
    """Difference between two models, and the verdict.

    The numbers are those of the output that is closest to its limit.

    Attributes:
        difference: Largest difference, relative to the largest value of the output.
        tolerance: Tolerance of the number formats in the model.
        noise: Difference that changing the reference's inputs by a few roundings makes; 0 if it was not needed.
        runs: Number of sets of inputs.
        effect: Difference between the original and the reference.
        allowed: Largest allowed difference: the tolerance, or what rounding explains, but at most a hundredth of the
            effect of the removed channels.
        verdict: One of `VERDICTS`.
        outputs: Result for each compared tensor.
        notes: Sentences that say why it is inconclusive, or qualify the verdict.

    """

    difference: float
    tolerance: float
    noise: float
    runs: int
    effect: float = 0.0
    allowed: float = 0.0
    verdict: str = VERIFIED
    outputs: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the proof succeeded."""
        return self.verdict == VERIFIED

    def noted(self, *sentences: str) -> Comparison:
        """Return the comparison with sentences that qualify it."""
        return replace(self, notes=(*self.notes, *sentences))

    def doubted(self, *sentences: str) -> Comparison:
        """Return the comparison as inconclusive at best, for the reasons given; unchanged without any."""
        if not sentences:
            return self
        return replace(self, verdict=max(self.verdict, INCONCLUSIVE, key=VERDICTS.index)).noted(*sentences)

    def summary(self) -> Summary:
        """Return the verdict and the numbers it is based on."""
        return Summary.of({
            "verdict": self.verdict, "difference": f"{self.difference:.2g}",
            "allowed": f"{self.allowed:.2g}", "by rounding alone": f"{self.noise:.2g}",
            "by the removal itself": f"{self.effect:.2g}", "sets of inputs": str(self.runs),
        })  # fmt: skip  # a table


@dataclass(frozen=True, eq=False)
class Runs:
    """Outputs of the models for each set of inputs.

    Attributes:
        plain: Outputs of the original.
        masked: Outputs of the reference: the original with the removed channels masked.
        pruned: Outputs of the model that should equal the reference.
        nudged: Function that runs the reference on inputs changed by a few roundings, from the number of the change.
        decoy: Function that runs the original with other channels masked; it returns None without other channels.
        branches: Numbers of the sets of inputs that reach each branch from which channels were removed, by description.

    """

    plain: Outputs
    masked: Outputs
    pruned: Outputs
    nudged: Callable[[int], Outputs]
    decoy: Callable[[], Outputs | None] = lambda: None
    branches: Mapping[str, Sequence[int]] = field(default_factory=dict)


def compare(
    plain: Outputs, reference: Runner, other: Runner, feeds: Sequence[Mapping[str, Array]], allowed: float
) -> Comparison:
    """Run two models and compare `other` with `reference`, each output to within `allowed` or what rounding explains.

    `plain` holds the outputs of the original for each of the inputs, which scale the differences. Raises DataError if
    they contain NaN, or there are no inputs.
    """
    require_numbers(plain)
    names = [f"output {number}" for number in range(len(plain[0]))]
    observed = [
        ComparedTensor(name, name, VALUES if array.dtype.kind == "f" else DISCRETE)
        for name, array in zip(names, plain[0], strict=True)
    ]
    expected, found = execute_all(reference, feeds), execute_all(other, feeds)
    runs = Runs(plain, expected, found, lambda number: execute_all(reference, nudged(feeds, number)))
    return judge(observed, runs, allowed)


def require_numbers(plain: Outputs) -> None:
    """Raise DataError if the outputs of the original contain NaN, or there are no inputs."""
    if not plain:
        raise DataError("there are no inputs to compare the models on")
    if any(o.dtype.kind == "f" and np.isnan(o).any() for outputs in plain for o in outputs):
        raise DataError("the original gives NaN on the inputs that were tried: give real data with --data")


def judge(observed: Sequence[ComparedTensor], runs: Runs, tolerance: float) -> Comparison:
    """Return the result for each compared tensor, and the worst verdict for all."""
    return _Judge(observed, runs, tolerance).run()


class _Judge:
    def __init__(self, observed: Sequence[ComparedTensor], runs: Runs, tolerance: float) -> None:
        self.observed, self.runs, self.tolerance = observed, runs, tolerance
        self.is_rms = tolerance == QUANTIZED
        self.notes: list[str] = []
        sizes = {one.name: sum(o[place].size for o in runs.plain) for place, one in enumerate(observed)}
        self.empty = {name for name, size in sizes.items() if not size}
        self._further: dict[str, Outputs | None] = {}

    def run(self) -> Comparison:
        found = tuple(self.finding(place, one) for place, one in enumerate(self.observed))
        shown = max(found, key=_closeness, default=None)
        verdict = max((f.verdict for f in found), key=VERDICTS.index, default=VERIFIED)
        silent = [what for what, places in self.runs.branches.items() if not self.shows(places)]
        self.notes += map(_branch_doubt, silent)
        if silent:
            verdict = max(verdict, INCONCLUSIVE, key=VERDICTS.index)
        if self.runs.branches and verdict == VERIFIED:
            self.notes.append(_branches(self.runs.branches))
        numbers = (shown.difference, shown.effect, shown.allowed) if shown is not None else (0.0, 0.0, self.tolerance)
        return Comparison(
            difference=numbers[0], tolerance=self.tolerance, noise=max((f.noise or 0.0 for f in found), default=0.0),
            runs=len(self.runs.plain), effect=numbers[1], allowed=numbers[2], verdict=verdict, outputs=found,
            notes=tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip  # names and numbers

    def finding(self, place: int, one: ComparedTensor) -> Finding:
        difference = self.apart(place, one, self.runs.masked, self.runs.pruned, is_pruned=True)
        effect = self.apart(place, one, self.runs.plain, self.runs.masked)
        tolerance = _FLIPPED if one.kind == DISCRETE else self.tolerance
        noise = None
        if tolerance < difference < float("inf"):
            noise = self.noise(place, one, difference)
        allowed = max(tolerance, _MARGIN * (noise or 0.0))
        power = None
        verdict = VERIFIED if difference <= allowed else WRONG
        if verdict == VERIFIED and one.is_behind:
            is_shown = self.is_shown(place, one, effect, difference)
            if not is_shown and one.is_affected:
                power = self.apart(place, one, self.runs.plain, self.further("decoy", self.runs.decoy))
                is_shown = self.is_shown(place, one, power, difference)
            if one.kind == VALUES and one.is_affected:
                allowed = min(allowed, _OF_EFFECT * max(effect, power or 0.0))
            if not is_shown:
                verdict = INCONCLUSIVE
                self.notes.append(_doubt(one, difference, max(effect, power or 0.0)))
        return Finding(one.output, one.name, one.kind, difference, allowed, effect, power, noise, verdict)

    def noise(self, place: int, one: ComparedTensor, difference: float) -> float:
        """Return the difference that a change of the inputs makes; for decisions, until one explains `difference`."""
        largest = 0.0
        for number in range(_CHANGES if one.kind == DISCRETE else 1):
            changed = self.further(f"nudged {number}", partial(self.runs.nudged, number))
            largest = max(largest, self.apart(place, one, self.runs.masked, changed))
            if difference <= _MARGIN * largest:
                break
        return largest

    def is_shown(self, place: int, one: ComparedTensor, effect: float, difference: float) -> bool:
        """Return whether an error would have shown in a tensor, given an effect on it."""
        if one.kind == DISCRETE or not self.empty.isdisjoint((one.output, one.name)):
            return True  # tensors that a decision is computed from are compared too; an empty tensor shows nothing
        if one.kind == SATURATING or not one.is_affected:
            return effect > 0 or self.varies(place)
        return effect >= _LEAST_EFFECT and difference <= _OF_EFFECT * effect

    def shows(self, runs: Sequence[int]) -> bool:
        """Return whether an error would have shown on some of the sets of inputs, as those that reach one branch."""

        def has_effect(masked: Outputs | None) -> bool:
            pairs = [] if masked is None else [(self.runs.plain[run], masked[run]) for run in runs]
            effects = (
                distance(one.surviving(a[place]), one.surviving(b[place]), one.surviving(a[place]))
                for a, b in pairs
                for place, one in enumerate(self.observed)
                if one.is_behind
            )
            return any(effect >= _LEAST_EFFECT for effect in effects)

        return has_effect(self.runs.masked) or has_effect(self.further("decoy", self.runs.decoy))

    def varies(self, place: int) -> bool:
        """Return whether a tensor of the original varies, over its elements or over the inputs."""
        arrays = [outputs[place] for outputs in self.runs.plain]
        if len(arrays) == 1:
            low, high = _bounds(arrays[0])
            return bool(low != high)
        return any(_differ(a, b) for a, b in pairwise(arrays))

    def further(self, name: str, run: Callable[[], Outputs | None]) -> Outputs | None:
        """Return the outputs of a further run, which is made once and only where it is needed."""
        if name not in self._further:
            self._further[name] = run()
        return self._further[name]

    def apart(
        self, place: int, one: ComparedTensor, first: Outputs, second: Outputs | None, *, is_pruned: bool = False
    ) -> float:
        """Return the difference of a tensor between two models over all inputs."""
        values = []
        for plain, left, right in zip(self.runs.plain, first, second or (), strict=second is not None):
            a, b = one.surviving(left[place]), right[place] if is_pruned else one.surviving(right[place])
            if one.kind == DISCRETE:
                values.append(flipped(a, b, self.tolerance))
            else:
                values.append(distance(a, b, one.surviving(plain[place]), rms=self.is_rms, least=one.offset))
        if not values:
            return 0.0
        return float(np.median(values)) if self.is_rms else max(values)


def _differ(a: Array, b: Array) -> bool:
    """Return whether two tensors differ, by their range where their shapes differ."""
    return not np.array_equal(a, b) if a.shape == b.shape else _bounds(a) != _bounds(b)


def _bounds(array: Array) -> tuple[Any, Any]:
    return (array.min(), array.max()) if array.size and array.dtype.kind in "fiub" else (None, None)


def _closeness(found: Finding) -> tuple[int, bool, float, float]:
    """Return the sort key of findings: verdict, numbers before decisions, difference as a fraction of the limit."""
    ratio = _ratio(found.difference, found.allowed)
    return VERDICTS.index(found.verdict), found.kind == VALUES, ratio, found.effect


def _doubt(one: ComparedTensor, difference: float, effect: float) -> str:
    """Return why a tensor proves nothing, and which inputs would."""
    where = f"output {one.output!r}"
    if one.name != one.output:
        where += f" (compared at {one.name!r}, which it is computed from)"
    if effect < _LEAST_EFFECT:
        return (
            f"{where}: masking channels does not change it on these inputs, so that an error would not show; "
            "give inputs on which it responds, with --data"
        )
    return (
        f"{where}: the models differ by {difference:.1e}, which rounding explains, but masking channels changes it by "
        f"only {effect:.1e}, less than a hundred times that; give inputs on which it responds more, with --data"
    )


def _branch_doubt(branch: str) -> str:
    return (
        f"masking the channels removed in {branch} does not change the outputs on the inputs that reach it, so that an "
        "error would not show; give inputs on which they respond, with --data"
    )


def _branches(reached: Mapping[str, Sequence[int]]) -> str:
    """Return which branches the proof compared, or how many."""
    if len(reached) > _MOST_BRANCHES:
        return f"each of the {len(reached)} branches in which channels were removed was compared"
    return f"{' and '.join(reached)} {'were each' if len(reached) > 1 else 'was'} compared"


def distance(expected: Array, got: Array, scale_of: Array, *, rms: bool = False, least: float = 0.0) -> float:
    """Return the largest difference relative to the largest value of `expected` and `scale_of`, or to `least`.

    With `rms`, the root mean square difference relative to that of `expected`. Infinite where shapes or finiteness
    differ, or no value is finite.
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
    return _ratio(apart.largest, max(size.largest, scale.largest, least))


def flipped(expected: Array, got: Array, tolerance: float) -> float:
    """Return the fraction of differing elements, floats by more than a tolerance; infinite where shapes differ."""
    if expected.shape != got.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind != "f":
        return float(np.mean(expected != got))
    finite = np.isfinite(expected)
    scale = float(np.abs(expected[finite]).max()) if finite.any() else 0.0
    return float(np.mean(~np.isclose(expected, got, rtol=0.0, atol=tolerance * scale, equal_nan=True)))


class _Extent:
    """Largest absolute value and root mean square of numbers that are added piece by piece."""

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
    """Return the tolerance of the narrowest number format in a model."""
    activations = {t.value.dtype for t in combed.tensors.values()}
    if combed.recorder.is_rounding or activations & {TensorProto.INT8, TensorProto.UINT8}:
        return QUANTIZED
    names: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    kinds = {weight.value.dtype for weight in combed.weights if weight.is_float and weight.size > 1}
    return max((TOLERANCES[names.get(kind, "float32")] for kind in kinds), default=TOLERANCES["float32"])


def runs_needed(allowed: float) -> int:
    """Return the number of sets of random inputs to try for a tolerance."""
    return 5 if allowed == QUANTIZED else 2


def nudged(feeds: Sequence[Mapping[str, Array]], number: int = 0) -> list[Feed]:
    """Return inputs changed by a few roundings, the same for the same inputs and number of the change."""
    return [_nudged(feed, number) for feed in feeds]


def _nudged(feed: Mapping[str, Array], number: int) -> Feed:
    rng = np.random.default_rng(number)
    return {
        name: (array * (1 + _NUDGE * rng.standard_normal(array.shape))).astype(array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in feed.items()
    }


@dataclass(frozen=True)
class OutputDifference:
    """Difference between the outputs of a model and of the model it was derived from.

    Attributes:
        largest: Largest difference of any output, relative to its range (largest minus smallest value).
        typical: Root mean square difference relative to the standard deviation, of the output where it is largest.
            Manifests hold it since version 1; what is shown is `of_range`, which has the denominator of `largest`.
        agreement: Fraction of samples (of pixels, for maps) with the same highest score; None where the first output
            has no axis of scores.
        samples: Number of samples.
        of_range: Root mean square difference relative to the range, of the output where it is largest; never above
            `largest`.
        allowed: Largest allowed difference, relative to the largest value, of a step that only rounds; None for others.

    """

    largest: float
    typical: float
    agreement: float | None
    samples: int
    of_range: float
    allowed: float | None = None


def output_difference(plain: Sequence[Sequence[Array]], found: Sequence[Sequence[Array]]) -> OutputDifference:
    """Return the difference between two lists of outputs, one entry for each set of inputs."""
    pairs = [(a, b) for ours, theirs in zip(plain, found, strict=True) for a, b in zip(ours, theirs, strict=True)]
    apart = [_relative(a, b) for a, b in pairs] or [(0.0, 0.0, 0.0)]
    scores = [(ours[0], theirs[0]) for ours, theirs in zip(plain, found, strict=True) if ours]
    count = sum(len(ours[0]) if ours and ours[0].ndim else 1 for ours in plain)
    largest, typical, of_range = (max(values) for values in zip(*apart, strict=True))
    return OutputDifference(largest, typical, _agreement(scores), count, of_range)


def _relative(a: Array, b: Array) -> tuple[float, float, float]:
    """Return `largest`, `typical` and `of_range` of two arrays; infinite where their shapes or finiteness differ."""
    never = (float("inf"), float("inf"), float("inf"))
    if a.shape != b.shape:
        return never
    if a.dtype.kind != "f" and a.dtype != element_type(TensorProto.BFLOAT16):
        return (0.0, 0.0, 0.0) if np.array_equal(a, b) else (1.0, 1.0, 1.0)
    wide, other = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(finite, np.isfinite(other)):
        return never
    wide, errors = wide[finite], other[finite] - wide[finite]
    if not errors.any():
        return 0.0, 0.0, 0.0
    size = float(np.abs(wide).max())
    extent, deviation = float(np.ptp(wide)) or size, float(wide.std()) or size
    if not size:
        return never
    largest, rms = float(np.abs(errors).max()), float(np.sqrt(np.mean(errors**2)))
    return largest / extent, rms / deviation, min(rms, largest) / extent  # rounding can lift the mean above the largest


def _agreement(pairs: Sequence[tuple[Array, Array]]) -> float | None:
    """Return the fraction of equal highest scores along axis 1; None without scores."""
    if not pairs or any(a.ndim < 2 or a.shape[1] < 2 or a.shape != b.shape or a.dtype.kind != "f" for a, b in pairs):
        return None
    same = [(a.argmax(1) == b.argmax(1)).ravel() for a, b in pairs]
    return float(np.concatenate(same).mean())
