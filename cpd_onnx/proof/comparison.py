"""Whether two models compute the same: how far apart each of their outputs is, and what that proves.

Three verdicts. *Verified*: each output agrees to within its own tolerance, and that is at most a hundredth of what the
removed channels change in it, so that an error in their removal would have shown. *Wrong*: some output is further away
than rounding explains. *Inconclusive*: neither can be said on these inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
"""Largest relative difference by the narrowest float type of the weights; quantised models get `QUANTIZED`."""
QUANTIZED = 5e-2
"""Median over the inputs of the root mean square instead: where sums are taken in another order, rounding may fall to
the other side, which deep networks amplify."""
VERIFIED, INCONCLUSIVE, WRONG = "verified", "inconclusive", "wrong"
VERDICTS = (VERIFIED, INCONCLUSIVE, WRONG)
"""What a comparison can find, best first."""
VALUES, SATURATING, DISCRETE = "values", "saturating", "discrete"
"""Kinds of compared tensors: numbers; numbers behind a non-linearity that may hide all in front of it; decisions, which
change by leaps and are compared by the share of elements that are the same."""
_PIECE = 1 << 20
"""Elements that are compared at a time."""
_NUDGE = 1e-6
"""Relative change of float inputs, of the size of a few roundings, that shows how much a model amplifies them."""
_MARGIN = 10.0
"""Two models that differ by less than this many times what a nudge does cannot be told apart."""
_OF_EFFECT = 0.01
"""Share of what the removed channels change that two models may be apart."""
_LEAST_EFFECT = 100 * 2.0**-23
"""Relative change below which a hundredth is less than one rounding of a float32."""
_FLIPPED = 1e-3
"""Share of decisions (an ArgMax, say) that may differ because two candidates are as good as equal."""

Outputs: TypeAlias = Sequence[Sequence[Array]]
"""For each set of inputs the compared tensors."""


@dataclass(frozen=True, eq=False)
class Observed:
    """A tensor that is compared.

    Attributes:
        name: of the tensor, in all models.
        output: the graph output for which it is compared: itself, or one that it is in front of.
        kind: `VALUES`, `SATURATING` or `DISCRETE`.
        is_affected: whether channels were removed from a sum that it depends on.
        is_behind: whether it depends on anything from which channels were removed, if only on the others.
        masks: for axes of it that were pruned themselves, which indices survive.

    """

    name: str
    output: str
    kind: str = VALUES
    is_affected: bool = False
    is_behind: bool = False
    masks: Mapping[int, Mask] = field(default_factory=dict)

    def surviving(self, array: Array) -> Array:
        """The tensor of a model of the original size without what was removed."""
        for axis, mask in self.masks.items():
            array = np.compress(mask, array, axis=axis)
        return array


@dataclass(frozen=True)
class Finding:
    """What was found of one compared tensor; all numbers are relative to its largest value.

    Attributes:
        output: the graph output.
        tensor: the tensor, the output itself or one in front of it.
        kind: see `Observed`.
        difference: between the masked original and the pruned model.
        allowed: what it may be.
        effect: difference between the original and the masked original.
        power: the same where as many other channels are masked, if that had to be asked.
        noise: what changing the inputs by a few roundings does, if that had to be asked.
        verdict: one of `VERDICTS`.

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
    """How far two models are apart, and what follows from it.

    The numbers are those of the output that comes nearest to its limit.

    Attributes:
        difference: largest difference, relative to the largest value of that output.
        tolerance: what it may be for the number formats in the model.
        noise: the same for the reference alone when its inputs change by a few roundings; 0 if nobody had to ask.
        runs: sets of inputs tried.
        effect: the same between the original and the reference: how much there was to see.
        allowed: what the difference may be: the tolerance, or what rounding explains, but no more than a hundredth of
            what the removed channels change.
        verdict: one of `VERDICTS`.
        outputs: what was found of each compared tensor.
        notes: sentences that say why it is inconclusive, or what the verdict leaves open.

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
        """The same with sentences that qualify it."""
        return replace(self, notes=(*self.notes, *sentences))

    def doubted(self, *sentences: str) -> Comparison:
        """The same with sentences that say why it can be inconclusive at best."""
        if not sentences:
            return self
        return replace(self, verdict=max(self.verdict, INCONCLUSIVE, key=VERDICTS.index)).noted(*sentences)

    def summary(self) -> Summary:
        """The verdict and what it is based on."""
        return Summary.of({
            "verdict": self.verdict, "difference": f"{self.difference:.2g}",
            "allowed": f"{self.allowed:.2g}", "by rounding alone": f"{self.noise:.2g}",
            "by the removal itself": f"{self.effect:.2g}", "sets of inputs": str(self.runs),
        })  # fmt: skip  # a table


@dataclass(frozen=True, eq=False)
class Runs:
    """What the models gave for each set of inputs.

    Attributes:
        plain: the original.
        masked: the reference: the original with the removed channels masked.
        pruned: the model that should equal it.
        nudged: gives the reference's outputs where the inputs change by a few roundings.
        decoy: gives those of the original with other channels masked; None where there are none.

    """

    plain: Outputs
    masked: Outputs
    pruned: Outputs
    nudged: Callable[[], Outputs]
    decoy: Callable[[], Outputs | None] = lambda: None


def compare(
    plain: Outputs, reference: Runner, other: Runner, feeds: Sequence[Mapping[str, Array]], allowed: float
) -> Comparison:
    """Run two models: `other` should equal `reference`, each output to within its tolerance or what rounding does.

    `plain` is what the original gives for each of the inputs: the scale of the outputs. Raises DataError if there is
    NaN in it, or there are no inputs.
    """
    require_numbers(plain)
    names = [f"output {number}" for number in range(len(plain[0]))]
    observed = [
        Observed(name, name, VALUES if array.dtype.kind == "f" else DISCRETE)
        for name, array in zip(names, plain[0], strict=True)
    ]
    expected, found = execute_all(reference, feeds), execute_all(other, feeds)
    runs = Runs(plain, expected, found, lambda: execute_all(reference, nudged(feeds)))
    return judge(observed, runs, allowed)


def require_numbers(plain: Outputs) -> None:
    """Raise DataError where the original gives NaN, or nothing was fed."""
    if not plain:
        raise DataError("there is no input to compare on")
    if any(o.dtype.kind == "f" and np.isnan(o).any() for outputs in plain for o in outputs):
        raise DataError("the original gives NaN on the inputs that were tried: give real data with --data")


def judge(observed: Sequence[Observed], runs: Runs, tolerance: float) -> Comparison:
    """The verdict on each compared tensor, and on all of them: the worst."""
    return _Judge(observed, runs, tolerance).run()


class _Judge:
    def __init__(self, observed: Sequence[Observed], runs: Runs, tolerance: float) -> None:
        self.observed, self.runs, self.tolerance = observed, runs, tolerance
        self.is_rms = tolerance == QUANTIZED
        self.notes: list[str] = []
        sizes = {one.name: sum(o[place].size for o in runs.plain) for place, one in enumerate(observed)}
        self.empty = {name for name, size in sizes.items() if not size}
        self._asked: dict[str, Outputs | None] = {}

    def run(self) -> Comparison:
        found = tuple(self.finding(place, one) for place, one in enumerate(self.observed))
        shown = max(found, key=_closeness, default=None)
        verdict = max((f.verdict for f in found), key=VERDICTS.index, default=VERIFIED)
        numbers = (shown.difference, shown.effect, shown.allowed) if shown is not None else (0.0, 0.0, self.tolerance)
        return Comparison(
            difference=numbers[0], tolerance=self.tolerance, noise=max((f.noise or 0.0 for f in found), default=0.0),
            runs=len(self.runs.plain), effect=numbers[1], allowed=numbers[2], verdict=verdict, outputs=found,
            notes=tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip  # what it is and its number

    def finding(self, place: int, one: Observed) -> Finding:
        difference = self.apart(place, one, self.runs.masked, self.runs.pruned, is_pruned=True)
        effect = self.apart(place, one, self.runs.plain, self.runs.masked)
        tolerance = _FLIPPED if one.kind == DISCRETE else self.tolerance
        noise = None
        if tolerance < difference < float("inf"):
            noise = self.apart(place, one, self.runs.masked, self.asked("nudged", self.runs.nudged))
        allowed = max(tolerance, _MARGIN * (noise or 0.0))
        power = None
        verdict = VERIFIED if difference <= allowed else WRONG
        if verdict == VERIFIED and one.is_behind:
            is_shown = self.is_shown(place, one, effect, difference)
            if not is_shown and one.is_affected:
                power = self.apart(place, one, self.runs.plain, self.asked("decoy", self.runs.decoy))
                is_shown = self.is_shown(place, one, power, difference)
            if one.kind == VALUES and one.is_affected:
                allowed = min(allowed, _OF_EFFECT * max(effect, power or 0.0))
            if not is_shown:
                verdict = INCONCLUSIVE
                self.notes.append(_doubt(one, difference, max(effect, power or 0.0)))
        return Finding(one.output, one.name, one.kind, difference, allowed, effect, power, noise, verdict)

    def is_shown(self, place: int, one: Observed, effect: float, difference: float) -> bool:
        """Whether an error would have shown, with so much to see."""
        if one.kind == DISCRETE or one.output in self.empty:
            return True  # the numbers in front of it show that; and of nothing there is nothing to show
        if one.kind == SATURATING or not one.is_affected:
            return effect > 0 or self.varies(place)
        return effect >= _LEAST_EFFECT and difference <= _OF_EFFECT * effect

    def varies(self, place: int) -> bool:
        """Whether a tensor changes with the inputs at all."""
        arrays = [outputs[place] for outputs in self.runs.plain]
        if len(arrays) == 1:
            low, high = _bounds(arrays[0])
            return bool(low != high)
        return any(_differ(a, b) for a, b in pairwise(arrays))

    def asked(self, name: str, give: Callable[[], Outputs | None]) -> Outputs | None:
        """What a further run gives, which is done once and only if it has to be."""
        if name not in self._asked:
            self._asked[name] = give()
        return self._asked[name]

    def apart(
        self, place: int, one: Observed, first: Outputs, second: Outputs | None, *, is_pruned: bool = False
    ) -> float:
        """How far a tensor of two models is apart over all inputs."""
        values = []
        for plain, left, right in zip(self.runs.plain, first, second or (), strict=second is not None):
            a, b = one.surviving(left[place]), right[place] if is_pruned else one.surviving(right[place])
            if one.kind == DISCRETE:
                values.append(flipped(a, b, self.tolerance))
            else:
                values.append(distance(a, b, one.surviving(plain[place]), rms=self.is_rms))
        if not values:
            return 0.0
        return float(np.median(values)) if self.is_rms else max(values)


def _differ(a: Array, b: Array) -> bool:
    """Whether a tensor has other values on other inputs; where sizes differ, whether their range is another."""
    return not np.array_equal(a, b) if a.shape == b.shape else _bounds(a) != _bounds(b)


def _bounds(array: Array) -> tuple[Any, Any]:
    return (array.min(), array.max()) if array.size and array.dtype.kind in "fiub" else (None, None)


def _closeness(found: Finding) -> tuple[int, bool, float, float]:
    """How near a finding is to its limit, by which the one that is shown is chosen: numbers before decisions."""
    ratio = _ratio(found.difference, found.allowed)
    return VERDICTS.index(found.verdict), found.kind == VALUES, ratio, found.effect


def _doubt(one: Observed, difference: float, effect: float) -> str:
    """Why nothing is proved of a tensor, and which inputs would decide."""
    where = f"output {one.output!r}"
    if one.name != one.output:
        where += f" (compared at {one.name!r}, in front of it)"
    if effect < _LEAST_EFFECT:
        return (
            f"{where}: on these inputs masking channels changes nothing in it, so that an error would not show; "
            "give inputs on which it responds, with --data"
        )
    return (
        f"{where}: the models are {difference:.1e} apart, as rounding explains, and masking channels changes it by "
        f"{effect:.1e} only, where at least a hundred times as much is needed; give inputs on which it responds more, "
        "with --data"
    )


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


def flipped(expected: Array, got: Array, tolerance: float) -> float:
    """Share of the elements that differ, floats by more than a tolerance; infinite where shapes do."""
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


def nudged(feeds: Sequence[Mapping[str, Array]]) -> list[Feed]:
    """Inputs that differ from others by a few roundings."""
    return [_nudged(feed) for feed in feeds]


def _nudged(feed: Mapping[str, Array]) -> Feed:
    rng = np.random.default_rng(0)
    return {
        name: (array * (1 + _NUDGE * rng.standard_normal(array.shape))).astype(array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in feed.items()
    }


@dataclass(frozen=True)
class Difference:
    """How far a model is from the one that it was made of.

    Attributes:
        largest: difference of any output, relative to its spread (largest minus smallest value).
        typical: root mean square of the differences of an output, relative to its standard deviation; of the output
            where that is most.
        agreement: share of samples (of pixels, for maps) whose largest score is the same; None where the first output
            has no axis of scores.
        samples: that were run.
        allowed: what the largest may be where a step only rounds, relative to the largest value; None where it is not
            judged.

    """

    largest: float
    typical: float
    agreement: float | None
    samples: int
    allowed: float | None = None


def output_difference(plain: Sequence[Sequence[Array]], found: Sequence[Sequence[Array]]) -> Difference:
    """How far outputs are apart."""
    pairs = [(a, b) for ours, theirs in zip(plain, found, strict=True) for a, b in zip(ours, theirs, strict=True)]
    apart = [_relative(a, b) for a, b in pairs] or [(0.0, 0.0)]
    scores = [(ours[0], theirs[0]) for ours, theirs in zip(plain, found, strict=True) if ours]
    count = sum(len(ours[0]) if ours and ours[0].ndim else 1 for ours in plain)
    largest, typical = (max(values) for values in zip(*apart, strict=True))
    return Difference(largest, typical, _agreement(scores), count)


def _relative(a: Array, b: Array) -> tuple[float, float]:
    """Largest and typical difference, by the spread of the first; infinite where shapes or finiteness differ."""
    never = (float("inf"), float("inf"))
    if a.shape != b.shape:
        return never
    if a.dtype.kind != "f" and a.dtype != element_type(TensorProto.BFLOAT16):
        return (0.0, 0.0) if np.array_equal(a, b) else (1.0, 1.0)
    wide, other = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(finite, np.isfinite(other)):
        return never
    wide, errors = wide[finite], other[finite] - wide[finite]
    if not errors.any():
        return 0.0, 0.0
    size = float(np.abs(wide).max())
    spread, deviation = float(np.ptp(wide)) or size, float(wide.std()) or size
    if not size:
        return never
    return float(np.abs(errors).max()) / spread, float(np.sqrt(np.mean(errors**2))) / deviation


def _agreement(pairs: Sequence[tuple[Array, Array]]) -> float | None:
    """Share of the largest scores, along axis 1, that are the same."""
    if not pairs or any(a.ndim < 2 or a.shape[1] < 2 or a.shape != b.shape or a.dtype.kind != "f" for a, b in pairs):
        return None
    same = [(a.argmax(1) == b.argmax(1)).ravel() for a, b in pairs]
    return float(np.concatenate(same).mean())
