"""The proof: a pruned model computes what the original computes with the removed channels masked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import TensorProto, helper

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import at_sizes
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import REPORT_BUG, InconclusiveError, ProofError, UnsupportedError
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof.comparison import (
    INCONCLUSIVE,
    QUANTIZED,
    TOLERANCES,
    WRONG,
    Comparison,
    Observed,
    Outputs,
    Runs,
    distance,
    judge,
    nudged,
    require_numbers,
    runs_needed,
)
from cpd_onnx.proof.inputs import ProofInputs, numbers_in, proof_inputs
from cpd_onnx.proof.masking import is_bound_to_sizes, masked
from cpd_onnx.proof.observing import observed
from cpd_onnx.proof.unrounded import HALF_TYPES, Undoable, rounding_of, single, unrounded
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import Feed, Runner, execute_all, open_model
from cpd_onnx.runtime.stepwise import Piecewise
from cpd_onnx.shapes.inference import fold_again

_PIECEWISE_BYTES = 1 << 28
"""Models with more bytes of weights are run piece by piece, and what is made of them."""


def verify(
    combed: Combed,
    keep: KeepMask,
    pruned: Model,
    feeds: Iterable[Mapping[str, Array]] | None = None,
) -> Comparison:
    """Compare the pruned model with the masked original in onnxruntime, optimisations off.

    Runs on the inputs that are given, and on random ones at sizes that combing did not use. Raises UnsupportedError if
    onnxruntime cannot run the original, ProofError if it runs that but not the pruned model, DataError if the original
    gives NaN.
    """
    return _Proof(combed, keep, pruned, _Masked(combed, keep, pruned).at, _others(combed, keep)).run(feeds)


def equal(combed: Combed, other: Model, channels: Axis) -> Comparison:
    """Compare the original with a model that should compute the same, as `verify` does.

    Masking `channels` shows how much there is to see. Errors are those of `verify`.
    """
    keep = KeepMask(combed.atoms, channels)
    return _Proof(combed, keep, other, lambda _: combed.folded.model, channels, is_pruned=False).run(None)


class _Masked:
    """The original with the removed channels masked, as a model for inputs of certain sizes."""

    def __init__(self, combed: Combed, keep: KeepMask, pruned: Model) -> None:
        self.combed, self.keep, self.pruned = combed, keep, pruned
        self.is_bound = is_bound_to_sizes(combed, keep)
        self._always: Model | None = None
        self._here: dict[tuple[tuple[int, ...], ...], Model | None] = {}

    def at(self, feed: Feed) -> Model:
        """The model; the same one for all inputs where it runs at all sizes. _UncomparableError if there is none."""
        if not self.is_bound:
            self._always = self._always or masked(self.combed, self.keep, self.pruned)
            return self._always
        key = tuple(array.shape for array in feed.values())
        if key not in self._here:
            found = at_sizes(self.combed, self.keep, numbers_in(self.combed.folded, feed))
            self._here[key] = None if found is None else masked(*found, self.pruned)
        model = self._here[key]
        if model is None:
            raise _UncomparableError(", ".join(f"{name} {list(array.shape)}" for name, array in feed.items()))
        return model


class _UncomparableError(Exception):
    """The masked original cannot be made for inputs of some sizes, since channels are coupled otherwise there."""


def _is_large(combed: Combed) -> bool:
    return combed.folded.model.data_bytes() > _PIECEWISE_BYTES


def runner_of(combed: Combed) -> Callable[[Model], Runner]:
    """What runs a model of that size: onnxruntime, or pieces of it where the model may be larger than memory."""
    if _is_large(combed):
        return lambda model: Piecewise(fold_again(combed.folded, model))
    return partial(open_model, optimise=False)


@dataclass(frozen=True, eq=False)
class _Form:
    """How models are written for the comparison.

    Attributes:
        written: gives a copy of a model in this form.
        floating: tensors that are integers in the file, numbers in this form.
        tolerance: what outputs may be apart.
        notes: what the form leaves out.

    """

    written: Callable[[Model], Model]
    floating: frozenset[str] = frozenset()
    tolerance: float = TOLERANCES["float32"]
    notes: tuple[str, ...] = ()


class _Proof:
    """The original, the reference made of it (with the removed channels masked), and a model that should equal this.

    `decoy` are channels that are masked where `keep` removes too little to see anything.
    """

    def __init__(
        self,
        combed: Combed,
        keep: KeepMask,
        other: Model,
        reference: Callable[[Feed], Model],
        decoy: Axis,
        *,
        is_pruned: bool = True,
    ) -> None:
        self.combed, self.keep, self.other, self.reference = combed, keep, other, reference
        self.channels, self.is_pruned = decoy, is_pruned
        self.original = combed.folded.model
        self.runner = runner_of(combed)
        self.feeds: list[Feed] = []
        self.form = _Form(lambda model: model)
        self.compared: list[Observed] = []
        self.doubts: list[str] = []

    def run(self, feeds: Iterable[Mapping[str, Array]] | None) -> Comparison:
        """The verdict, on inputs that are given or on random ones."""
        session = self.runner(self.combed.folded.original)
        given = [] if feeds is None else [dict(feed) for feed in feeds]
        count, is_large = runs_needed(self.form.tolerance), _is_large(self.combed)
        inputs = proof_inputs(self.combed.folded, session, count, given=given, is_large=is_large)
        given = [feed for feed in inputs.feeds if self.is_comparable(feed)]
        if not given:
            return Comparison(0.0, self.form.tolerance, 0.0, 0, verdict=INCONCLUSIVE, notes=tuple(self.doubts))
        self.require_evaluated(session, given)
        rounding = rounding_of(self.original)
        if not rounding:
            del session
            return self.reached(self.compare(given), inputs)
        before = execute_all(session, given[:1])
        del session
        found = self.without_rounding(given, has_integers=rounding.has_integers)
        for outputs in before:
            self.require_as_stored(given[0], outputs)
        return self.reached(found, inputs)

    def is_comparable(self, feed: Feed) -> bool:
        """Whether the reference can be made for the sizes of some inputs; puts a doubt on record where it cannot.

        None does, without a doubt, where an axis of one index makes other channels the only ones.
        """
        try:
            self.reference(feed)
        except _UncomparableError as error:
            if not any(1 in array.shape for array in feed.values()):
                self.doubts.append(f"with inputs {error} other channels are coupled than at the sizes of the analysis")
            return False
        return True

    def reached(self, found: Comparison, inputs: ProofInputs) -> Comparison:
        """The verdict in view of what no input reached: branches that hold removed channels prove nothing."""
        found = found.doubted(*self.doubts)
        for path, what in inputs.unreached:
            sentence = f"no input reached {what}; give inputs that do, with --data"
            found = found.doubted(sentence) if path and self.is_edited(path) else found.noted(sentence)
        return found

    def is_edited(self, path: str) -> bool:
        """Whether something inside of a subgraph lost channels."""
        uses = (use for weight in self.combed.weights for use in weight.uses)
        return any(
            f"{use.use.scope.path}/".startswith(f"{path}/") and any(map(self.keep.shrinks, use.axes)) for use in uses
        )

    def require_evaluated(self, session: Runner, given: Sequence[Feed]) -> None:
        """Raise ProofError where evaluating weights that the graph computes changes its outputs."""
        if self.combed.folded.evaluated is None:
            return
        before, after = execute_all(session, given), execute_all(self.runner(self.original), given)
        pairs = (pair for ours, theirs in zip(before, after, strict=True) for pair in zip(ours, theirs, strict=True))
        apart = max((distance(expected, got, expected) for expected, got in pairs), default=0.0)
        allowed = max(TOLERANCES.values()) if rounding_of(self.original) else self.form.tolerance
        if not apart <= allowed:
            raise ProofError(
                f"wrong: evaluating the weights that the graph computes changes its outputs by {apart:.2g}, at most "
                f"{allowed:.0e} is allowed; nothing is written. "
                f"This is an internal error: {REPORT_BUG}"
            )

    def without_rounding(self, given: list[Feed], *, has_integers: bool) -> Comparison:
        """The verdict on models in which nothing is rounded; where that cannot be, as they are, by a looser measure."""
        wide = [_single(feed) for feed in given]
        if not has_integers:
            self.form = _Form(single, notes=("compared as float32, without rounding to 16 bits",))
            return self.compare(wide)
        folded = self.combed.folded
        try:
            made, floating = unrounded(single(self.original), folded)
            self.runner(made)
            self.form = _Form(
                lambda model: unrounded(single(model), folded)[0],
                floating,
                notes=("compared as float32, without rounding to integers",),
            )
            return self.compare(wide)
        except (Undoable, UnsupportedError) as error:
            why = f"compared with its rounding to integers, which cannot be left out: {error}"
            self.form = _Form(single, tolerance=QUANTIZED, notes=(why,))
            return self.compare(wide)

    def compare(self, given: list[Feed]) -> Comparison:
        """The verdict on the models in one form."""
        compared = observed(self.combed, self.keep, self.form.floating)
        self.compared = [one for one in compared if (self.is_pruned or not one.masks) and self.has_fixed_masks(one)]
        original = self.open(self.original)
        self.feeds = given
        plain = execute_all(original, given)
        del original  # what it holds is not needed twice
        require_numbers([outputs[: self.outputs] for outputs in plain])
        try:
            expected, found = self.with_masks(self.reference, given), execute_all(self.open(self.other), given)
            runs = Runs(plain, expected, found, lambda: self.with_masks(self.reference, nudged(given)), self.decoy)
            return judge(self.compared, runs, self.form.tolerance).noted(*self.form.notes)
        except UnsupportedError as error:
            raise ProofError(f"onnxruntime runs the original but not what was made of it: {error}") from error

    def has_fixed_masks(self, one: Observed) -> bool:
        """Whether the masks of a tensor fit it at all sizes of the inputs."""
        value = self.combed.folded.scope.values.get(one.name)
        return not one.masks or (value is not None and all(map(value.has_fixed, one.masks)))

    def with_masks(self, reference: Callable[[Feed], Model], feeds: Sequence[Feed]) -> Outputs:
        """What the masked original gives for each of some inputs; inputs that share a model share a session."""
        models = [reference(feed) for feed in feeds]
        found: list[list[Array]] = [[] for _ in feeds]
        for model in {id(m): m for m in models}.values():
            places = [place for place, one in enumerate(models) if one is model]
            outputs = execute_all(self.open(model), [feeds[place] for place in places])
            for place, made in zip(places, outputs, strict=True):
                found[place] = made
        return found

    @property
    def outputs(self) -> int:
        """Number of graph outputs, which are compared first."""
        return len(self.original.graph.output)

    def open(self, model: Model) -> Runner:
        """Something that runs a model and gives all compared tensors, in order."""
        written = self.form.written(model)
        extra = self.compared[self.outputs :]
        if extra:
            written = written.copy() if written is model else written
            values = self.combed.folded.scope.values
            for one in extra:
                kind = values[one.name].dtype
                if one.name in self.form.floating or (self.form.notes and kind in HALF_TYPES):
                    kind = TensorProto.FLOAT
                written.graph.output.append(helper.make_tensor_value_info(one.name, kind, None))
        return self.runner(written)

    def require_as_stored(self, feed: Feed, before: Sequence[Array]) -> None:
        """Raise where a model that rounds does not run as it is, or gives other shapes than the original."""
        try:
            after = execute_all(self.runner(self.other), [feed])[0]
        except UnsupportedError as error:
            raise ProofError(f"onnxruntime runs the original but not what was made of it: {error}") from error
        for info, a, b in zip(self.original.graph.output, before, after, strict=True):
            value = self.combed.folded.scope.values.get(info.name)
            if a.shape != b.shape and not (value is not None and value.has_placeholder):
                raise ProofError(
                    f"output {info.name!r} has shape {list(b.shape)} after pruning, {list(a.shape)} before"
                )

    # The power of the comparison.

    def decoy(self) -> Outputs | None:
        """What the original gives with as many other channels of the same groups masked."""
        if not len(self.channels):
            return None
        keep = KeepMask(self.combed.atoms, self.channels)
        try:
            small = rewrite(self.combed, keep).model
            return self.with_masks(_Masked(self.combed, keep, small).at, self.feeds)
        except (ProofError, UnsupportedError, _UncomparableError):  # these cannot go together
            return None


def _single(feed: Mapping[str, Array]) -> Feed:
    """Inputs with half floats as float32."""
    return {
        name: array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iu" else array
        for name, array in feed.items()
    }


def _others(combed: Combed, keep: KeepMask) -> Axis:
    """Channels that survive, from each group as many as are removed, as far as there are so many."""
    rng = np.random.default_rng(0)
    chosen = [np.zeros(0, np.int64)]
    for group in combed.groups:
        stays = keep.surviving(group.channels.reshape(-1, 1))
        others = group.channels[stays]
        count = min(len(group) - len(others), len(others))
        chosen.append(np.sort(rng.permutation(others)[:count]))
    return np.concatenate(chosen)


def proved(found: Comparison, *, allow_inconclusive: bool = False) -> Comparison:
    """The verification if it passed; raises ProofError if it failed, InconclusiveError if it shows too little."""
    if found.verdict == WRONG:
        worst = next((f for f in found.outputs if f.verdict == WRONG), None)
        where = f" in output {worst.output!r}" if worst is not None else ""
        raise ProofError(
            f"wrong: the pruned model differs from the masked original by {found.difference:.2g}{where}, "
            f"at most {found.allowed:.0e} is allowed; nothing is written. "
            f"This is an internal error: {REPORT_BUG}"
        )
    if found.verdict == INCONCLUSIVE and not allow_inconclusive:
        raise InconclusiveError(
            f"inconclusive: {'; '.join(found.notes)}; nothing is written (--allow-inconclusive writes it all the same)"
        )
    return found
