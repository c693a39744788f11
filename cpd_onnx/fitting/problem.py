"""The fit of one weight to rows of features and targets in batches, of which the last ones validate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from cpd_onnx.fitting.least_squares import Matrix, Moments, Rows, lift, summed
from cpd_onnx.fitting.steps import Steps
from cpd_onnx.ops.matrix_view import Vector
from cpd_onnx.runtime.shards import Divided

_SILENT = 1e-6
"""Factor below which an output has no measurable effect, so that nothing is fitted before it (heuristic)."""
_STRONGER = 10.0**0.5
"""Factor from one regularization strength to the next that is tried (heuristic)."""
_MOST_TRIED = 9
"""Maximum number of regularization strengths that are tried (heuristic)."""
_ROUNDING = 1.5
"""Ratio to the rounding of the targets up to which an error is nothing else (heuristic)."""
_STILL = 0.03
"""Change of the products, relative to the error, below which a fit is not repeated (heuristic)."""
_FLAT, _HIDDEN = 0.01, 0.1
"""Square of a slope, relative to the steepest one, below which an activation hides a difference, and the least fraction
of differences that it has to hide (heuristic)."""
_GOOD = 1e-5
"""Relative error up to which a weight is not refitted (heuristic)."""


@dataclass(frozen=True, eq=False)
class Block:
    """The rows of one batch.

    Attributes:
        rows: Features [groups, rows, features].
        wanted: Targets [groups, rows, outputs].
        other: What is added to the product before the activation, of the same shape; None for nothing. The targets are
            those of the product alone.
        seen: Targets behind an activation that does not clip; None without one.
    """

    rows: Rows
    wanted: Rows
    other: Rows | None = None
    seen: Rows | None = None

    def bounds(self, bounds: tuple[float, float]) -> tuple[Rows | float, Rows | float]:
        """Return the bounds of the product where those of the activation are given."""
        low, high = bounds
        return (low, high) if self.other is None else (np.float32(low) - self.other, np.float32(high) - self.other)

    @staticmethod
    def joined(blocks: Sequence[Block]) -> Block:
        """Return the rows of several blocks as one."""
        others = [block.other for block in blocks]
        if any(other is not None for other in others):
            others = [
                np.zeros_like(b.wanted) if other is None else other for b, other in zip(blocks, others, strict=True)
            ]
        return Block(
            np.concatenate([block.rows for block in blocks], axis=1),
            np.concatenate([block.wanted for block in blocks], axis=1),
            None if others[0] is None else np.concatenate([o for o in others if o is not None], axis=1),
        )

    def part(self, rows: slice) -> Block:
        """Return some of the rows."""
        other = None if self.other is None else self.other[:, rows]
        return Block(self.rows[:, rows], self.wanted[:, rows], other)


@dataclass(frozen=True, eq=False)
class Solution:
    """A fitted weight.

    Attributes:
        matrix: The weight [groups, features, outputs].
        constant: Constant that is added to its products [groups, 1, outputs].
        before, after: Root mean square error over the standard deviation of the target, on held-out rows.
        scales: Scales of a quantised weight; None for a float one.
    """

    matrix: Matrix
    constant: Matrix
    before: float
    after: float
    scales: Vector | None = None


@dataclass(eq=False)
class Problem:
    """A fit of gain * (rows x matrix + constant) + shift to targets.

    Attributes:
        blocks: Rows by batch.
        held_out: Number of the last blocks that validate the fit.
        start: Initial matrix [groups, features, outputs].
        gain, shift: Affine function that follows the product [outputs].
        centred: Whether a constant is fitted too.
        bounds: Bounds to which an activation clips the target.
        ridge: Minimum strength of the regularization towards the initial matrix.
        rounds: Number of times that targets are moved to where they matter, see `aims`.
        refits: Whether a fit that passed is made again from all blocks, also those that validated it.
        steps: Steps of a quantised weight; None for a float one.
        stored: Function that returns the constant that can be stored in place of another.
        noise: Root mean square of the rounding of the targets.
        activation: An activation behind the target that does not clip, element by element; None for none.
        precision: Rounding of the targets relative to them, where they are computed in less than single precision.
    """

    blocks: Divided[Block]
    held_out: int
    start: Matrix
    gain: Vector
    shift: Vector
    centred: bool
    bounds: tuple[float, float]
    ridge: float
    rounds: int
    refits: bool = False
    steps: Steps | None = None
    stored: Callable[[Matrix], Matrix] | None = None
    noise: float = 0.0
    activation: Callable[[Rows], Rows] | None = None
    precision: float = 0.0
    _steepest: Rows | None = field(init=False, default=None)
    _is_effective: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        """Bring gain and shift into the shape of the outputs."""
        groups = self.start.shape[0]
        self.gain, self.shift = (v.reshape(groups, 1, -1) for v in (self.gain, self.shift))
        # Outputs without an effect on the target are not changed.
        self._is_effective = np.abs(self.gain) > _SILENT

    def seen(self, block: Block) -> Rows:
        """Return the targets of a block behind the activation."""
        return self.behind(block, block.wanted) if block.seen is None else block.seen

    @property
    def fitted_blocks(self) -> Divided[Block]:
        """Blocks to which the weight is fitted."""
        return self.blocks[: len(self.blocks) - self.held_out]

    @property
    def checks(self) -> Divided[Block]:
        """Blocks that validate the fit; all if none is held out."""
        return self.blocks[len(self.blocks) - self.held_out :] if self.held_out else self.blocks

    def solved(self) -> Solution | None:
        """Return the best fit; None if the weight needs no repair or the fit does not improve it."""
        deviation = self.deviation() or 1.0
        before = self.error(self.start, np.zeros(1)) / deviation
        if self.activation is not None and not (np.isfinite(before) and self.is_flat()):
            return replace(self, activation=None).solved()
        if not before > max(_GOOD, self.precision, _ROUNDING * self.noise / deviation):
            return None
        if self.activation is not None:  # which takes longer than to clip
            self.blocks = self.blocks.map(lambda block: replace(block, seen=self.seen(block)))
        moments = self.moments()
        ridge, matrix, constant = self.fitted(moments)
        fit = matrix, constant
        matrix, constant, scales = self.rounded(*fit, moments, ridge)
        after = self.error(matrix, constant) / deviation
        if not after < before:
            return None
        if self.refits and self.held_out:
            whole = replace(self, held_out=0)
            moments = whole.moments()
            matrix, constant, scales = whole.rounded(*whole.at(ridge, moments, fit), moments, ridge)
        return Solution(matrix, constant, before, after, scales)

    def rounded(
        self, matrix: Matrix, constant: Matrix, moments: Moments, ridge: float
    ) -> tuple[Matrix, Matrix, Vector | None]:
        """Return a fit as it can be stored: a quantised weight in its steps, and a constant that makes up for them."""
        if self.steps is None:
            return matrix, constant, None
        found, scales = self.steps.rounded(matrix, moments.lifted(ridge))
        found = np.where(self._is_effective, found, self.start)
        constant = np.where(self._is_effective, constant + moments.mean @ (matrix - found), 0.0)
        return found, constant if self.stored is None else self.stored(constant), scales

    def deviation(self) -> float:
        """Return the standard deviation of the targets."""
        count, total, squares = self.fitted_blocks.total(lambda block: _power_sums(block.wanted))
        return float(np.sqrt(np.maximum(squares / count - np.square(total / count), 0).mean()))

    def fitted(self, moments: Moments | None = None) -> tuple[float, Matrix, Matrix]:
        """Return the strength of the regularization that is best on held-out rows, with its matrix and constant."""
        moments = moments or self.moments()
        ridge, cross = self.ridge, self.cross(moments, lambda block: block.wanted)
        best = self.once(moments, cross, ridge)
        error = self.error(*best)
        for _ in range(_MOST_TRIED - 1):
            stronger = self.once(moments, cross, ridge * _STRONGER)
            if not (now := self.error(*stronger)) < error:
                break
            best, ridge, error = stronger, ridge * _STRONGER, now
        return ridge, *self.aimed(moments, best, ridge)

    def at(
        self, ridge: float, moments: Moments | None = None, near: tuple[Matrix, Matrix] | None = None
    ) -> tuple[Matrix, Matrix]:
        """Return matrix and constant for one strength of the regularization; `near` is a fit from which to begin."""
        moments = moments or self.moments()
        if near is None or not self.is_hiding:
            near = self.once(moments, self.cross(moments, lambda block: block.wanted), ridge)
        return self.aimed(moments, near, ridge)

    @property
    def is_hiding(self) -> bool:
        """Whether an activation may hide errors."""
        return self.activation is not None or bool(np.isfinite(self.bounds).any())

    def aimed(self, moments: Moments, best: tuple[Matrix, Matrix], ridge: float) -> tuple[Matrix, Matrix]:
        """Return a fit again, to targets that follow it where the activation hides errors.

        Each round lowers the error behind the activation, by least squares with the same moments. As that is slow where
        much is hidden, a fit is extrapolated by its last change (Beck and Teboulle, FISTA, 2009) before the next.
        """
        if not self.is_hiding:
            return best
        if self.activation is not None and self._steepest is None:
            self._steepest = self.steepest(self.fitted_blocks, best)
        still = _STILL * self.error(*best)
        ahead, momentum = best, 1.0
        for _ in range(self.rounds):
            fit = self.once(moments, self.cross(moments, partial(self.aims, fit=ahead)), ridge)
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            factor = (momentum - 1) / following
            ahead = (fit[0] + factor * (fit[0] - best[0]), fit[1] + factor * (fit[1] - best[1]))
            change = (fit[0] - best[0]) * self.gain
            best, momentum = fit, following
            if np.sqrt((change * (moments.gram @ change)).sum() / self.gain.size) < still:
                break
        return best

    def moments(self) -> Moments:
        """Return the moments of the features."""
        return Moments(self.fitted_blocks.total(lambda block: summed(block.rows)), centred=self.centred)

    def aims(self, block: Block, fit: tuple[Matrix, Matrix]) -> Rows:
        """Return targets that are nearer to the fit, the less of the difference is left behind the activation.

        Targets that it clips become any equivalent nearest to the fit. Those of another activation are moved by the
        square of its slope between target and fit, relative to the steepest one (majorization and minimization).
        """
        made = self.products(block.rows, *fit)
        if self._steepest is not None:
            share = self.steepness(block, made)
            share /= self._steepest
            np.minimum(share, 1, out=share)
            share *= block.wanted - made
            return np.add(made, share, out=made)
        low, high = block.bounds(self.bounds)
        aims = np.where(block.wanted > low, block.wanted, np.minimum(made, low))
        return np.asarray(np.where(aims < high, aims, np.maximum(made, high)), np.float32)

    def steepness(self, block: Block, made: Rows) -> Rows:
        """Return the squares of the activation's slopes between targets and products [groups, rows, outputs]."""
        slopes = self.seen(block) - self.behind(block, made)
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes /= block.wanted - made
        slopes *= slopes
        slopes[~np.isfinite(slopes)] = 1
        return slopes

    def is_flat(self) -> bool:
        """Return whether the activation hides enough differences of targets and products to be worth the rounds.

        A leaky rectifier hides none, nor does a logarithm, which is not defined everywhere. The rows that validate the
        fit show that.
        """
        start = self.start, np.zeros(1)
        steepest = self.steepest(self.checks, start)

        def of(block: Block) -> float:
            return float((self.steepness(block, self.products(block.rows, *start)) / steepest < _FLAT).mean())

        return float(np.mean(self.checks.each(of))) > _HIDDEN

    def steepest(self, blocks: Divided[Block], fit: tuple[Matrix, Matrix]) -> Rows:
        """Return the square of the activation's steepest slope between the targets of each output and a fit."""

        def of(block: Block) -> Rows:
            made = self.products(block.rows, *fit)
            return np.asarray(self.steepness(block, made).max(axis=1, keepdims=True))

        found = np.max(blocks.each(of), axis=0)
        return np.asarray(np.maximum(found, np.finfo(np.float32).tiny))

    def behind(self, block: Block, products: Rows) -> Rows:
        """Return what products of a block are behind the activation."""
        if self.activation is not None:
            return self.activation(products if block.other is None else products + block.other)
        return np.clip(products, *block.bounds(self.bounds))

    def cross(self, moments: Moments, aims: Callable[[Block], Rows]) -> tuple[Matrix, Matrix]:
        """Return the mean products of centred features and targets, and the mean target, both before gain and shift."""
        gain, shift = (np.asarray(v, np.float32) for v in (np.where(self._is_effective, self.gain, 1.0), self.shift))

        def of(block: Block) -> tuple[Matrix, Matrix]:
            aim = (aims(block) - shift) / gain
            return block.rows.swapaxes(1, 2) @ aim, aim.sum(axis=1, keepdims=True, dtype=np.float64)

        products, total = self.fitted_blocks.total(of)
        middle = total / moments.count * self.centred
        return products / moments.count - moments.mean.swapaxes(1, 2) * middle, middle

    def once(self, moments: Moments, cross: tuple[Matrix, Matrix], ridge: float) -> tuple[Matrix, Matrix]:
        """Return the least-squares fit for one strength of the regularization."""
        fitted = moments.solved(ridge, cross[0] + lift(moments.gram, ridge) * self.start)
        constant = cross[1] - moments.mean @ fitted
        return np.where(self._is_effective, fitted, self.start), np.where(self._is_effective, constant, 0.0)

    def products(self, rows: Rows, matrix: Matrix, constant: Matrix) -> Rows:
        """Return the products after gain and shift."""
        factor, addend = (matrix * self.gain).astype(np.float32), (constant * self.gain + self.shift)
        return np.asarray(rows @ factor + addend.astype(np.float32))

    def error(self, matrix: Matrix, constant: Matrix) -> float:
        """Return the root mean square error on the held-out rows, behind the activation."""

        def of(block: Block) -> tuple[float, int]:
            wrong = self.behind(block, self.products(block.rows, matrix, constant))
            wrong -= self.seen(block)
            return float(np.square(wrong).sum(dtype=np.float64)), wrong.size

        squares, count = self.checks.total(of)
        return float(np.sqrt(squares / max(1, count)))


def _power_sums(array: Rows) -> tuple[int, Matrix, Matrix]:
    return array.shape[1], array.sum(axis=1, dtype=np.float64), np.square(array, dtype=np.float64).sum(axis=1)
