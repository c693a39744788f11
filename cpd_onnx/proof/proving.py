"""The proof that a pruned model equals the original with the removed channels masked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from onnx import TensorProto, helper

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import branches, gone_groups
from cpd_onnx.channels.combing import at_sizes
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import REPORT_BUG, InconclusiveError, PlanError, ProofError, UnsupportedError
from cpd_onnx.io.progress import advance, step
from cpd_onnx.ir.interface import cut, kept_by
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.proof.comparison import (
    INCONCLUSIVE,
    QUANTIZED,
    TOLERANCES,
    WRONG,
    ComparedTensor,
    Comparison,
    Outputs,
    Runs,
    distance,
    judge,
    nudged,
    require_numbers,
    runs_needed,
)
from cpd_onnx.proof.inputs import ProofInputs, beyond_solved, numbers_in, proof_inputs
from cpd_onnx.proof.masking import is_bound_to_sizes, masked
from cpd_onnx.proof.observing import compared_tensors
from cpd_onnx.proof.unrounded import HALF_TYPES, NotUnroundableError, rounding_of, single, unrounded
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.draws import NOTE, draws, with_fixed_draws
from cpd_onnx.runtime.sessions import Feed, Runner, execute_all, open_model
from cpd_onnx.runtime.stepwise import Piecewise
from cpd_onnx.shapes.inference import fold_again

_PIECEWISE_BYTES = 1 << 28
"""Bytes of weights (256 MB, a heuristic) above which a model and those derived from it are run piece by piece."""
_NOT_REPEATED = (
    "the original does not repeat itself: with the same inputs, its outputs differ from run to run, and cannot be "
    "compared"
)
"""Doubt about a model whose outputs, or their sizes, differ from run to run."""
_MOST_ELSEWHERE = 3
"""Number of inputs that are compared at other sizes than operators seem to require (heuristic)."""
_PARTS = 4
"""Parts of a comparison: runs of the original, of the masked original and of the pruned model, and the verdict."""


@step("verify")
def verify(
    combed: Combed,
    keep: KeepMask,
    pruned: Model,
    feeds: Iterable[Mapping[str, Array]] | None = None,
) -> Comparison:
    """Compare the pruned model with the masked original in onnxruntime, with optimisations off.

    The models run on the given inputs and on random inputs of sizes that combing did not use. Raises UnsupportedError
    if onnxruntime cannot run the original, ProofError if it runs the original but not the pruned model, and DataError
    if outputs of the original contain NaN.
    """
    return _Proof(combed, keep, pruned, _Masked(combed, keep, pruned).at, _others(combed, keep)).run(feeds)


def equal(combed: Combed, other: Model, channels: Axis) -> Comparison:
    """Compare the original with a model that should be equivalent, as `verify` does and with its errors.

    The effect that differences are judged by is that of masking `channels`.
    """
    keep = KeepMask(combed.atoms, channels)
    return _Proof(combed, keep, other, lambda _: combed.folded.model, channels, is_pruned=False).run(None)


class _Masked:
    """The masked original, built again for inputs of other sizes where that is necessary."""

    def __init__(self, combed: Combed, keep: KeepMask, pruned: Model) -> None:
        self.combed, self.keep, self.pruned = combed, keep, pruned
        self.is_bound = is_bound_to_sizes(combed, keep)
        self._always: Model | None = None
        self._here: dict[tuple[tuple[int, ...], ...], Model | None] = {}

    def at(self, feed: Feed) -> Model:
        """Return the masked original for some inputs; raises _UncomparableError if there is none of their sizes."""
        if not self.is_bound:
            self._always = self._always or masked(self.combed, self.keep, self.pruned)
            return self._always
        key = tuple(array.shape for array in feed.values())
        if key not in self._here:
            self._here[key], found = None, at_sizes(self.combed, self.keep, numbers_in(self.combed.folded, feed))
            with suppress(PlanError):  # a branch that is gone is needed at these sizes
                self._here[key] = None if found is None else masked(*found, self.pruned)
        model = self._here[key]
        if model is None:
            raise _UncomparableError(", ".join(f"{name} {list(array.shape)}" for name, array in feed.items()))
        return model


class _UncomparableError(Exception):
    """Raised for inputs of sizes at which channels are coupled differently, so that the removal has no counterpart."""


def _is_large(combed: Combed) -> bool:
    return combed.folded.model.data_bytes() > _PIECEWISE_BYTES


def runner_of(combed: Combed) -> Callable[[Model], Runner]:
    """Return the function that opens models of this size: onnxruntime, piece by piece for large models.

    Random numbers that the models draw are fixed, see `with_fixed_draws`.
    """
    if _is_large(combed):
        return lambda model: Piecewise(fold_again(combed.folded, with_fixed_draws(model)))
    return lambda model: open_model(with_fixed_draws(model), optimise=False)


@dataclass(frozen=True, eq=False)
class _Form:
    """A numerical form of the models for the comparison.

    Attributes:
        written: Function from a model to the model in this form.
        floating: Names of tensors that are integers in the file and floats in this form.
        tolerance: Largest allowed difference of outputs.
        notes: Sentences on what the form leaves out.

    """

    written: Callable[[Model], Model]
    floating: frozenset[str] = frozenset()
    tolerance: float = TOLERANCES["float32"]
    notes: tuple[str, ...] = ()


class _Proof:
    """The comparison of a model with a reference derived from the original (with the removed channels masked).

    `decoy` holds channels that are masked instead where the effect of the removed ones is too small.
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
        self.branches: dict[str, list[int]] = {}
        self.form = _Form(lambda model: model)
        self.compared: list[ComparedTensor] = []
        self.doubts: list[str] = []

    def run(self, feeds: Iterable[Mapping[str, Array]] | None) -> Comparison:
        """Return the verdict on given and random inputs."""
        session = self.runner(self.combed.folded.original)
        given = [] if feeds is None else [dict(feed) for feed in feeds]
        count, is_large = runs_needed(self.form.tolerance), _is_large(self.combed)
        inputs = proof_inputs(self.combed.folded, session, count, given=given, is_large=is_large)
        given = [feed for feed in inputs.feeds if self.is_comparable(feed)]
        if not given:
            return Comparison(0.0, self.form.tolerance, 0.0, 0, verdict=INCONCLUSIVE, notes=tuple(self.doubts))
        self.require_evaluated(session, given)
        self.branches = self.edited_branches(inputs, given)
        self.doubts += self.elsewhere(session)
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

    def elsewhere(self, session: Runner) -> Iterator[str]:
        """Yield a doubt if the original runs at sizes that its operators seem not to accept, where the two differ."""
        folded = self.combed.folded
        if not folded.solved or not self.is_pruned or self.original.free_io or _is_large(self.combed):
            return
        allowed = QUANTIZED if rounding_of(self.original) else self.form.tolerance
        seeming = ", ".join(f"{name} = {number}" for name, number in folded.solved.items())
        for feed in islice(beyond_solved(folded, session), _MOST_ELSEWHERE):
            if not self.is_alike(feed, allowed):
                here = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
                seen = f"operators seem to require {seeming}, but the original runs with {here} too, where the pruned"
                yield f"{seen} model differs; if only the former sizes are meant, give them with --input-shape"
                return

    def is_alike(self, feed: Feed, allowed: float) -> bool:
        """Return whether the pruned model gives the outputs of the masked original for some inputs."""
        try:
            models = self.reference(feed), self.other
            expected, found = (execute_all(self.runner(model), [feed])[0] for model in models)
        except (_UncomparableError, UnsupportedError):
            return False
        return all(distance(one, other, one) <= allowed for one, other in zip(expected, found, strict=True))

    def is_comparable(self, feed: Feed) -> bool:
        """Return whether there is a reference for the sizes of some inputs; records a doubt where there is none.

        Inputs with an axis of size one are skipped without a doubt: there, other channels are the last ones of an axis.
        """
        try:
            self.reference(feed)
        except _UncomparableError as error:
            if not any(1 in array.shape for array in feed.values()):
                self.doubts.append(
                    f"channels are coupled differently with inputs {error} than at the sizes of the analysis"
                )
            return False
        return True

    def reached(self, found: Comparison, inputs: ProofInputs) -> Comparison:
        """Return the verdict with a doubt for each pruned branch that no input reached, and a note for others."""
        found = found.doubted(*self.doubts).noted(*([NOTE] if draws(self.original) else []))
        for path, what in inputs.unreached:
            sentence = f"no input reached {what}; give inputs that do, with --data"
            found = found.doubted(sentence) if path and self.is_edited(path) else found.noted(sentence)
        return found

    def edited_branches(self, inputs: ProofInputs, given: Sequence[Feed]) -> dict[str, list[int]]:
        """Return the numbers of the inputs that reach each branch from which channels were removed."""
        numbers = {id(feed): number for number, feed in enumerate(given)}
        return {
            what: [numbers[id(feed)] for feed in feeds if id(feed) in numbers]
            for (path, what), feeds in inputs.branches.items()
            if self.is_pruned and self.is_edited(path)
        }

    def is_edited(self, path: str) -> bool:
        """Return whether channels were removed from a weight used inside a subgraph."""
        uses = (use for weight in self.combed.weights for use in weight.uses)
        return any(
            f"{use.use.scope.path}/".startswith(f"{path}/") and any(map(self.keep.shrinks, use.axes)) for use in uses
        )

    def require_evaluated(self, session: Runner, given: Sequence[Feed]) -> None:
        """Raise ProofError if evaluating the weights that the graph computes changed its outputs."""
        if self.combed.folded.evaluated is None:
            return
        before, after = execute_all(session, given), execute_all(self.runner(self.original), given)
        pairs = (pair for ours, theirs in zip(before, after, strict=True) for pair in zip(ours, theirs, strict=True))
        difference = max((distance(expected, got, expected) for expected, got in pairs), default=0.0)
        allowed = max(TOLERANCES.values()) if rounding_of(self.original) else self.form.tolerance
        if difference <= allowed:
            return
        if not self.repeats(session, given):
            self.doubts.append(_NOT_REPEATED)
        else:
            raise ProofError(
                f"wrong: evaluating the weights that the graph computes changes its outputs by {difference:.2g}, "
                f"at most {allowed:.0e} is allowed; nothing is written. "
                f"This is an internal error: {REPORT_BUG}"
            )

    def without_rounding(self, given: list[Feed], *, has_integers: bool) -> Comparison:
        """Return the verdict on models without rounding; where that fails, with integer rounding and `QUANTIZED`."""
        wide = [_single(feed) for feed in given]
        if not has_integers:
            self.form = _Form(single, notes=("compared as float32, without rounding to 16 bits",))
            return self.compare(wide)
        folded = self.combed.folded
        try:
            rounded = self.rounded_constants()
            model, floating = unrounded(single(self.original), folded, rounded)
            self.runner(model)
            self.form = _Form(
                lambda model: unrounded(single(model), folded, rounded)[0],
                floating,
                notes=("compared as float32, without rounding to integers",),
            )
            return self.compare(wide)
        except (NotUnroundableError, UnsupportedError) as error:
            why = f"compared with its rounding to integers, which cannot be left out: {error}"
            self.form = _Form(single, tolerance=QUANTIZED, notes=(why,))
            return self.compare(wide)

    def rounded_constants(self) -> frozenset[str]:
        """Return the tensors that are quantised from what removed branches leave, which the pruned model stores."""
        nodes = self.combed.folded.scope.nodes
        found = branches(self.combed, gone_groups(self.combed, self.keep))
        made = (nodes[position] for position in found.constants)
        return frozenset(node.output[0] for node in made if traits_of(node).is_quantizer and traits_of(node).saturates)

    def compare(self, given: list[Feed]) -> Comparison:
        """Return the verdict on the models in the present form."""
        compared = compared_tensors(self.combed, self.keep, self.form.floating)
        self.compared = [one for one in compared if (self.is_pruned or not one.masks) and self.is_fit(one)]
        original = self.open(self.original)
        self.feeds = given
        plain = execute_all(original, given)
        advance(1, _PARTS)
        del original  # frees its memory before other sessions are opened
        require_numbers([outputs[: self.outputs] for outputs in plain])
        try:
            expected = self.with_masks(self.reference, given)
            advance(2, _PARTS)
            found = execute_all(self.open(self.other), given)
            advance(3, _PARTS)
            runs = Runs(
                plain,
                expected,
                found,
                lambda number: self.with_masks(self.reference, nudged(given, number)),
                self.decoy,
                self.branches,
            )
            return self.unless_random(judge(self.compared, runs, self.form.tolerance)).noted(*self.form.notes)
        except UnsupportedError as error:
            raise ProofError(f"onnxruntime runs the original but not a model derived from it: {error}") from error

    def unless_random(self, found: Comparison) -> Comparison:
        """Return a verdict, but inconclusive for wrong where the original does not repeat its own outputs."""
        if found.verdict != WRONG or self.repeats(self.open(self.original), self.feeds):
            return found
        return replace(found, verdict=INCONCLUSIVE).noted(_NOT_REPEATED)

    def repeats(self, session: Runner, feeds: Sequence[Feed]) -> bool:
        """Return whether a model gives the same outputs twice in a session: not all that is random can be fixed."""
        first, second = execute_all(session, feeds), execute_all(session, feeds)
        pairs = (pair for ours, theirs in zip(first, second, strict=True) for pair in zip(ours, theirs, strict=True))
        return all(a.tobytes() == b.tobytes() or distance(a, b, a) <= self.form.tolerance for a, b in pairs)

    def is_fit(self, one: ComparedTensor) -> bool:
        """Return whether a tensor can be compared: an output, or one whose masks apply at all sizes of the inputs.

        Other tensors must be in the other model too, and not be drawn at random.
        """
        scope = self.combed.folded.scope
        value, maker = scope.values.get(one.name), scope.producers.get(one.name)
        if one.name != one.output:
            is_random = maker is not None and traits_of(scope.nodes[maker]).is_random
            if is_random or not any(one.name in node.output for node in self.other.graph.node):
                return False
        return not one.masks or (value is not None and all(map(value.has_fixed, one.masks)))

    def with_masks(self, reference: Callable[[Feed], Model], feeds: Sequence[Feed]) -> Outputs:
        """Return the outputs of the reference for each of some inputs; inputs with the same model share a session."""
        models = [reference(feed) for feed in feeds]
        found: list[list[Array]] = [[] for _ in feeds]
        for model in {id(m): m for m in models}.values():
            places = [place for place, one in enumerate(models) if one is model]
            outputs = execute_all(self.open(model), [feeds[place] for place in places])
            for place, each in zip(places, outputs, strict=True):
                found[place] = each
        return found

    @property
    def outputs(self) -> int:
        """Number of graph outputs, which are compared first."""
        return len(self.original.graph.output)

    def open(self, model: Model) -> Runner:
        """Open a session of a model that returns all compared tensors, in order."""
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
        """Raise ProofError if a model with rounding does not run as stored, or its outputs have other shapes."""
        try:
            after = execute_all(self.runner(self.other), [feed])[0]
        except UnsupportedError as error:
            raise ProofError(f"onnxruntime runs the original but not a model derived from it: {error}") from error
        kept = kept_by(self.other)
        expected: list[Array] | None = None
        for place, (info, b) in enumerate(zip(self.original.graph.output, after, strict=True)):
            value, a = self.combed.folded.scope.values.get(info.name), cut(before[place], kept.get(info.name, {}))
            if a.shape == b.shape or (value is not None and value.has_placeholder):
                continue
            expected = expected or execute_all(self.runner(self.reference(feed)), [feed])[0]
            if cut(expected[place], kept.get(info.name, {})).shape == a.shape:  # else, it depends on numbers
                raise ProofError(
                    f"output {info.name!r} of the pruned model must have shape {list(a.shape)}, got {list(b.shape)}"
                )

    # The power of the comparison.

    def decoy(self) -> Outputs | None:
        """Return the outputs of the original with the decoy channels masked; None if that is not possible."""
        if not len(self.channels):
            return None
        keep = KeepMask(self.combed.atoms, self.channels)
        try:
            small = rewrite(self.combed, keep).model
            return self.with_masks(_Masked(self.combed, keep, small).at, self.feeds)
        except (ProofError, UnsupportedError, _UncomparableError):  # these channels cannot be removed together
            return None


def _single(feed: Mapping[str, Array]) -> Feed:
    """Return inputs with half floats converted to float32."""
    return {
        name: array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iu" else array
        for name, array in feed.items()
    }


def _others(combed: Combed, keep: KeepMask) -> Axis:
    """Return surviving channels of each group, as many as are removed from it if there are."""
    rng = np.random.default_rng(0)
    chosen = [np.zeros(0, np.int64)]
    for group in combed.groups:
        others = group.channels[keep.surviving(group.channels.reshape(-1, 1))]
        count = min(len(group) - len(others), len(others))
        chosen.append(np.sort(rng.permutation(others)[:count]))
    return np.concatenate(chosen)


def proved(found: Comparison, *, allow_inconclusive: bool = False) -> Comparison:
    """Return a comparison that is verified; raises ProofError if it is wrong, InconclusiveError if inconclusive."""
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
