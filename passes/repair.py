"""Repair: fit the weights of a pruned model by least squares, so that it reproduces the outputs of the original.

Weights of linear operators are fitted one after the other to the original's output of the same operator, on the inputs
in the pruned and already repaired model, so that errors do not accumulate (He et al., Channel Pruning for Accelerating
Very Deep Neural Networks, ICCV 2017). If the output is added to another tensor (a residual connection), the error of
that tensor is compensated as well. No gradients, labels or torch are needed.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import numpy as np

from cpd_onnx.algebra.atoms import Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.errors import DataError
from cpd_onnx.fitting.least_squares import MAX_FEATURES, Matrix, Moments, Sampler, one_thread
from cpd_onnx.fitting.output_error import output_error, outputs_of
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.io.progress import step, tracked
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.options import option, positive
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.sessions import Feed
from cpd_onnx.runtime.stepwise import Stepwise

_BATCH = 32
"""Number of samples in a run of the models."""
_SILENT = 1e-6
"""Factor below which an output has no measurable effect, so that nothing is fitted before it (heuristic)."""
_STRONGER = 10.0
"""Factor from one regularization strength to the next that is tried (heuristic)."""
_MOST_TRIED = 4
"""Maximum number of regularization strengths that are tried (heuristic)."""
_CHECKED = 8
"""One in this many rows is held out to validate the fit (heuristic)."""
_FEW = 200
"""Number of samples below which a note says that they are few, unless no more were asked for (heuristic)."""
_LEAST = 2
"""Number of samples that a repair takes: one to fit and one to check."""
_GOOD = 1e-5
"""Relative error up to which a weight is not refitted (heuristic)."""


@dataclass(frozen=True)
class RepairOptions:
    """Options of the repair.

    Attributes:
        samples: Number of samples.
        rows: Approximate number of rows (positions in the samples) for each fit.
        ridge: Minimum strength of the regularization towards the initial weights, as a fraction of the mean square of a
            feature; stronger values are chosen if they are better on held-out rows.
        rounds: Number of times that targets below zero, which a rectifier cuts off, are replaced by the fitted values;
            0 fits the inputs of the rectifier.
        seed: Seed of the choice of samples and rows.
    """

    samples: int = option(512, "Number of samples used for the repair", read=positive)
    rows: int = 1 << 16
    ridge: float = 1e-3
    rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """One fitted weight.

    Attributes:
        weight: Name of the weight.
        target: Tensor whose values in the original are the targets.
        before, after: Root mean square error over the standard deviation of the target, on held-out rows.
    """

    weight: str
    target: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Repaired:
    """A model with fitted weights.

    Attributes:
        model: The model.
        fits: Fitted weights in the order of the graph.
        left: Weights of linear operators that were not fitted, and why.
        notes: What the user should know, such as that the samples were too few.
    """

    model: Model
    fits: tuple[Fit, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@step("repair")
def repair(
    combed: Combed,
    kept: KeepMask,
    pruned: Model,
    data: Source,
    options: RepairOptions | None = None,
    *,
    only: Container[str] | None = None,
) -> Repaired:
    """Fit the weights of a pruned model to the original.

    An eighth of the samples (a third of fewer than 32) is held out: a weight is fitted only if that lowers its error on
    them. If the error of the outputs on them does not fall, the result is the pruned model, and a note says so.

    Args:
        combed: The original.
        kept: Mask of what survives of it.
        pruned: The pruned model, which is not changed.
        data: Samples; labels are not used.
        options: Options of the repair.
        only: Weights that may be fitted; None means all.

    Raises:
        DataError: The data does not fit the model or there is none.
        UnsupportedError: onnxruntime cannot run a part of the model.
    """
    chosen = options or RepairOptions()
    original = combed.folded.model
    most = chosen.samples if data.count is None else min(chosen.samples, data.count)
    batch = max(1, min(_BATCH, most // _CHECKED))  # so that held-out samples are whole batches
    feeds = list(calibration(original.proto, data, chosen.samples, batch=batch, seed=chosen.seed))
    sizes = [next((len(array) for array in feed.values() if array.ndim), 1) for feed in feeds]
    if sum(sizes) < _LEAST:
        return Repaired(pruned.copy(), (), {}, (f"nothing was repaired, which takes {_LEAST} samples or more",))
    with one_thread():
        made = _Repairer(combed, kept, pruned, feeds, chosen, only).run()
    if only is not None:
        return made
    if sum(sizes) < min(_FEW, chosen.samples):
        made = replace(made, notes=(f"the repair had {sum(sizes)} samples only: a few hundred make it more accurate",))
    return (
        made
        if not made.fits
        else _unless_worse(original, pruned, made, feeds[len(feeds) - _held_out(len(feeds), sum(sizes)) :])
    )


def _held_out(count: int, samples: int) -> int:
    """Return how many of that many batches are held out: an eighth, or a third where the samples are very few."""
    return max(1, count // (3 if samples < _BATCH else _CHECKED)) if count > 1 else 0


def _unless_worse(original: Model, pruned: Model, made: Repaired, feeds: Sequence[Feed]) -> Repaired:
    """Return a repair, or the pruned model if the outputs on held-out samples are no nearer to the original's."""
    if not feeds or original.is_over_limit:
        return made
    wanted = list(outputs_of(original, feeds))
    before, after = (output_error(wanted, outputs_of(model, feeds)) for model in (pruned, made.model))
    if after < before or before == 0:
        return made
    note = (
        f"nothing was repaired: it would not have lowered the error of the outputs on held-out samples ({before:.3g} "
        f"of their variance before, {after:.3g} after); more samples, or samples that are more varied, may help"
    )
    left = {fit.weight: "no better on held-out samples" for fit in made.fits}
    return Repaired(pruned.copy(), (), {**made.left, **left}, (note,))


@dataclass(frozen=True)
class Repair(RepairOptions):
    """Fit the weights of the pruned model to the original by least squares."""

    name: ClassVar[str] = "repair"
    requires: ClassVar[tuple[str, ...]] = ("combed", "allocation", "plan")
    provides: ClassVar[tuple[str, ...]] = ("repaired",)

    def __call__(self, state: State) -> State:
        """Fill in `repaired`; `model` becomes the model with fitted weights, which are recorded in the plan."""
        if state.data is None:
            raise DataError("a repair needs samples: give --data, or a source as `data`")
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        options = RepairOptions(**{f.name: getattr(self, f.name) for f in fields(RepairOptions)})
        repaired = repair(combed, chosen.keep_mask(combed), state.model, state.data, options)
        plan = state.plan and state.plan.with_values(state.model, repaired.model)
        return replace(state, model=repaired.model, repaired=summary(repaired), plan=plan)


def summary(repaired: Repaired) -> dict[str, object]:
    """Return the fitted and the other weights as plain values."""
    return {
        "fitted": [
            {"weight": f.weight, "before": round(f.before, 5), "after": round(f.after, 5)} for f in repaired.fits
        ],
        "left": dict(repaired.left),
        "notes": list(repaired.notes),
    }


class _Repairer:
    def __init__(
        self,
        combed: Combed,
        kept: KeepMask,
        pruned: Model,
        feeds: Sequence[Feed],
        options: RepairOptions,
        only: Container[str] | None,
    ) -> None:
        self.combed, self.kept, self.options = combed, kept, options
        self.model = pruned.copy()
        found = units_of(combed.folded, self.model)
        self.units = [unit for unit in found.found if only is None or unit.weight in only]
        self.left = {name: why for name, why in found.left.items() if only is None or name in only}
        self.makers = combed.folded.scope.producers
        self.old = Stepwise(combed.folded, combed.folded.model, feeds, [unit.target for unit in self.units])
        self.new = Stepwise(combed.folded, self.model, feeds)
        self.sampler = Sampler(options.rows, options.seed)
        sizes = [next((len(array) for array in feed.values() if array.ndim), 1) for feed in feeds]
        held = _held_out(len(feeds), sum(sizes))
        self.held_out = sum(sizes[len(sizes) - held :]) / sum(sizes) if held else 1 / _CHECKED

    def run(self) -> Repaired:
        fits = []
        for unit in tracked(self.units):
            self.new.after(unit.position - 1)
            self.old.after(self.makers[unit.target])
            problem = _FitProblem(unit, self.model, self.rows(unit), self.held_out, self.options)
            fit = problem.solved()
            if fit is not None:
                fits.append(fit)
            self.old.release(unit.target)
        return Repaired(self.model, tuple(fits), self.left)

    def rows(self, unit: Unit) -> tuple[Array, Array]:
        """Return features in the pruned model and targets from the original at the same positions."""
        masks = [self.kept.mask(axis) for axis in self.combed.tensors[("", unit.target)].axes or []]
        wanted = [_kept(array, masks) for array in self.old.tensor(unit.target)]
        if unit.other is not None:
            pairs = zip(wanted, self.new.tensor(unit.other), strict=True)
            wanted = [array - np.asarray(other, np.float32) for array, other in pairs]
        return self.sampler.rows(unit.linear, self.new.tensor(unit.data), wanted)


def _kept(array: Array, masks: Sequence[Mask]) -> Array:
    for axis, mask in enumerate(masks):
        if len(mask) == array.shape[axis] and not mask.all():
            array = np.compress(mask, array, axis=axis)
    return np.asarray(array, np.float32)


class _FitProblem:
    """The fit of one weight: rows and targets, of which the last share, from other samples, is held out."""

    def __init__(
        self, unit: Unit, model: Model, both: tuple[Array, Array], held_out: float, options: RepairOptions
    ) -> None:
        self.unit, self.model, self.options = unit, model, options
        rows, wanted = both
        cut = rows.shape[1] - int(rows.shape[1] * held_out)
        self.rows, self.wanted = rows[:, :cut], wanted[:, :cut]
        self.check = (rows[:, cut:], wanted[:, cut:]) if cut < rows.shape[1] else (rows, wanted)
        self.start: Matrix = unit.matrix(model)
        self.gain, self.shift = (v.reshape(len(rows), 1, -1) for v in (unit.gain, unit.shift))
        # Outputs without an effect on the target are not changed.
        self.is_effective = np.abs(self.gain) > _SILENT

    def solved(self) -> Fit | None:
        """Fit and store the weight; returns None if it needs no repair or does not improve."""
        deviation = float(np.sqrt(self.wanted.var(axis=1).mean())) or 1.0
        before = self.error(self.start, np.zeros(1)) / deviation
        if not before > _GOOD or self.rows.shape[2] > MAX_FEATURES:
            return None
        fitted, constant = self.fitted()
        after = self.error(fitted, constant) / deviation
        if not after < before:
            return None
        self.unit.store(self.model, fitted)
        bias = self.unit.bias
        if bias is not None:
            old = self.model.array(bias.name)
            factor = np.where(np.abs(bias.factor) > _SILENT, bias.factor, 1.0)
            change = (constant * self.gain).ravel() / factor
            self.model.set_array(bias.name, (old + change.reshape(old.shape)).astype(np.float32))
        return Fit(self.unit.weight, self.unit.target, before, after)

    def fitted(self) -> tuple[Matrix, Matrix]:
        moments, ridge = Moments(self.rows, centred=self.unit.bias is not None), self.options.ridge
        fitted, constant = self.once(moments, self.wanted, ridge)
        for _ in range(_MOST_TRIED - 1):
            stronger = self.once(moments, self.wanted, ridge * _STRONGER)
            if not self.error(*stronger) < self.error(fitted, constant):
                break
            (fitted, constant), ridge = stronger, ridge * _STRONGER
        for _ in range(self.options.rounds if self.unit.rectified else 0):
            # The rectifier cuts off negative values, so that any negative value is a correct one.
            aims = np.where(self.wanted > 0, self.wanted, np.minimum(self.products(self.rows, fitted, constant), 0))
            fitted, constant = self.once(moments, aims, ridge)
        return fitted, constant

    def once(self, moments: Moments, aims: Array, ridge: float) -> tuple[Matrix, Matrix]:
        """Return the fit to targets, which are the products after gain and shift."""
        fitted, constant = moments.fit(
            (aims - self.shift) / np.where(self.is_effective, self.gain, 1.0), self.start, ridge
        )
        return np.where(self.is_effective, fitted, self.start), np.where(self.is_effective, constant, 0.0)

    def products(self, rows: Array, matrix: Matrix, constant: Matrix) -> Array:
        product = rows @ matrix.astype(np.float32) + constant.astype(np.float32)
        return np.asarray(product * self.gain.astype(np.float32) + self.shift.astype(np.float32))

    def error(self, matrix: Matrix, constant: Matrix) -> float:
        """Return the root mean square error on the held-out rows, after the rectifier if there is one."""
        rows, wanted = self.check
        floor = 0.0 if self.unit.rectified else -np.inf
        products = np.maximum(self.products(rows, matrix, constant), floor)
        return float(np.sqrt(np.square(products - np.maximum(wanted, floor)).mean()))
