"""Repair: give a pruned model's weights new values by least squares, so that it computes what the original did.

Layer after layer: each weight that is multiplied and summed is fitted to the original's output at the same place, on
the inputs that the pruned and already repaired model has there, so that errors do not pile up (He et al., Channel
Pruning for Accelerating Very Deep Neural Networks, ICCV 2017). Where the output is added to another tensor (a
residual), what that lacks is made up for as well. There are no gradients, no labels and no torch.
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
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.options import option, positive
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.sessions import Feed
from cpd_onnx.runtime.stepwise import Stepwise

_BATCH = 32
_SILENT = 1e-6
"""A factor below which nothing passes, so that nothing can be said of what comes before."""
_STRONGER = 10.0
"""From one ridge to the next that is tried."""
_MOST_TRIED = 4
_CHECKED = 8
"""One in so many rows is kept from the fit, to see whether it is one."""
_GOOD = 1e-5
"""Relative error of what needs no repair."""


@dataclass(frozen=True)
class RepairOptions:
    """How weights are fitted.

    Attributes:
        samples: see the option.
        rows: places in them that one fit looks at, about.
        ridge: how strongly weights are held to what they were at least, as a share of the mean square of a feature;
            more where that is better on rows that the fit does not see.
        rounds: of asking anew for what a rectifier cuts off anyway; 0 fits what goes into it.
        seed: of the choice of samples and rows.
    """

    samples: int = option(512, "Number of samples used for the repair", read=positive)
    rows: int = 1 << 16
    ridge: float = 1e-3
    rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """One weight that was fitted.

    Attributes:
        weight: its name.
        target: tensor whose values in the original were aimed at.
        before, after: root mean square error over the spread of the target, on rows that the fit did not see.
    """

    weight: str
    target: str
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Repaired:
    """A model with fitted weights.

    Attributes:
        fits: in the order of the graph.
        left: weights that multiply but were not fitted, and why.
    """

    model: Model
    fits: tuple[Fit, ...]
    left: Mapping[str, str] = field(default_factory=dict)


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

    Args:
        combed: the original.
        kept: what stayed of it.
        pruned: the model without the rest; it is not changed.
        data: samples; labels do not matter.
        options: see there.
        only: weights that may be fitted; None stands for all.

    Raises:
        DataError: the data does not fit the model or there is none.
        UnsupportedError: onnxruntime does not run some piece of the model.
    """
    chosen = options or RepairOptions()
    proto = combed.folded.model.proto
    feeds = list(calibration(proto, data, chosen.samples, batch=_BATCH, seed=chosen.seed))
    with one_thread():
        return _Repairer(combed, kept, pruned, feeds, chosen, only).run()


@dataclass(frozen=True)
class Repair(RepairOptions):
    """Fit the weights of the pruned model to the original by least squares."""

    name: ClassVar[str] = "repair"
    requires: ClassVar[tuple[str, ...]] = ("combed", "allocation", "plan")
    provides: ClassVar[tuple[str, ...]] = ("repaired",)

    def __call__(self, state: State) -> State:
        """Fill in `repaired`; `model` becomes the one with fitted weights, which the plan names."""
        if state.data is None:
            raise DataError("a repair looks at samples: give --data, or a source as `data`")
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        options = RepairOptions(**{f.name: getattr(self, f.name) for f in fields(RepairOptions)})
        made = repair(combed, chosen.keep_mask(combed), state.model, state.data, options)
        plan = state.plan and state.plan.with_values(state.model, made.model)
        return replace(state, model=made.model, repaired=summary(made), plan=plan)


def summary(made: Repaired) -> dict[str, object]:
    """What was done, as plain values."""
    return {
        "fitted": [{"weight": f.weight, "before": round(f.before, 5), "after": round(f.after, 5)} for f in made.fits],
        "left": dict(made.left),
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

    def run(self) -> Repaired:
        fits = []
        for unit in self.units:
            self.new.after(unit.position - 1)
            self.old.after(self.makers[unit.target])
            problem = _Problem(unit, self.model, *self.rows(unit), self.options)
            fit = problem.solved()
            if fit is not None:
                fits.append(fit)
            self.old.release(unit.target)
        return Repaired(self.model, tuple(fits), self.left)

    def rows(self, unit: Unit) -> tuple[Array, Array]:
        """Features in the pruned model, and what the original has at the same places."""
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


class _Problem:
    """One weight, its rows, and what it should make of them: most to fit, the last ones, of other samples, to check."""

    def __init__(self, unit: Unit, model: Model, rows: Array, wanted: Array, options: RepairOptions) -> None:
        self.unit, self.model, self.options = unit, model, options
        cut = rows.shape[1] - rows.shape[1] // _CHECKED
        self.rows, self.wanted = rows[:, :cut], wanted[:, :cut]
        self.check = (rows[:, cut:], wanted[:, cut:]) if cut < rows.shape[1] else (rows, wanted)
        self.start: Matrix = unit.matrix(model)
        self.gain, self.shift = (v.reshape(len(rows), 1, -1) for v in (unit.gain, unit.shift))
        # What reaches the target hardly or not at all stays as it is.
        self.speaks = np.abs(self.gain) > _SILENT

    def solved(self) -> Fit | None:
        """Fit and store the weight; None where it is good as it is, or does not get better."""
        spread = float(np.sqrt(self.wanted.var(axis=1).mean())) or 1.0
        before = self.error(self.start, np.zeros(1)) / spread
        if not before > _GOOD or self.rows.shape[2] > MAX_FEATURES:
            return None
        fitted, constant = self.fitted()
        after = self.error(fitted, constant) / spread
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
            # What is cut off may be anything below zero.
            aims = np.where(self.wanted > 0, self.wanted, np.minimum(self.made(self.rows, fitted, constant), 0))
            fitted, constant = self.once(moments, aims, ridge)
        return fitted, constant

    def once(self, moments: Moments, aims: Array, ridge: float) -> tuple[Matrix, Matrix]:
        """The fit to some aims, which lie behind gain and shift."""
        fitted, constant = moments.fit((aims - self.shift) / np.where(self.speaks, self.gain, 1.0), self.start, ridge)
        return np.where(self.speaks, fitted, self.start), np.where(self.speaks, constant, 0.0)

    def made(self, rows: Array, matrix: Matrix, constant: Matrix) -> Array:
        product = rows @ matrix.astype(np.float32) + constant.astype(np.float32)
        return np.asarray(product * self.gain.astype(np.float32) + self.shift.astype(np.float32))

    def error(self, matrix: Matrix, constant: Matrix) -> float:
        """Root mean square on the rows to check, behind the rectifier if there is one."""
        rows, wanted = self.check
        floor = 0.0 if self.unit.rectified else -np.inf
        made = np.maximum(self.made(rows, matrix, constant), floor)
        return float(np.sqrt(np.square(made - np.maximum(wanted, floor)).mean()))
