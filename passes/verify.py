"""Verify: the pruned model computes what the original computes with the removed channels masked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from onnx import TensorProto, helper

from cpd_onnx.atoms import Axis
from cpd_onnx.compare import (
    INCONCLUSIVE,
    QUANTIZED,
    TOLERANCES,
    WRONG,
    Comparison,
    Observed,
    Outputs,
    Runs,
    judge,
    nudged,
    require_numbers,
    runs_needed,
)
from cpd_onnx.data import Batch, Source, fixed_batch, inputs_of
from cpd_onnx.deploy import Difference as OutputDifference
from cpd_onnx.errors import InconclusiveError, ProofError, UnsupportedError
from cpd_onnx.graph import Array, Model
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.masking import masked
from cpd_onnx.observing import observed
from cpd_onnx.passes.comb import planned
from cpd_onnx.plan import Plan
from cpd_onnx.replayed import measured, require_replay, same_bytes
from cpd_onnx.rewrite import rewrite
from cpd_onnx.runtime import Feed, Runner, execute_all, open_model, working_feeds
from cpd_onnx.state import State
from cpd_onnx.stepwise import Piecewise
from cpd_onnx.unrounded import HALF_TYPES, Undoable, rounding_of, single, unrounded

_PIECEWISE_BYTES = 1 << 28
"""Models with more bytes of weights are run piece by piece, and what is made of them."""


def verify(
    combed: Combed,
    kept: Kept,
    pruned: Model,
    feeds: Iterable[Mapping[str, Array]] | None = None,
    *,
    doubts: Sequence[str] = (),
) -> Comparison:
    """Compare the pruned model with the masked original in onnxruntime, optimisations off.

    Runs on random inputs if none are given. `doubts` are sentences about what these inputs do not reach; with one, the
    verdict is inconclusive at best. Raises UnsupportedError if onnxruntime cannot run the original, ProofError if it
    runs that but not the pruned model, DataError if the original gives NaN.
    """
    proof = _Proof(combed, kept, pruned, lambda: masked(combed, kept, pruned), _others(combed, kept))
    return proof.run(feeds).doubted(*doubts)


def equal(combed: Combed, other: Model, channels: Axis) -> Comparison:
    """Compare the original with a model that should compute the same, as `verify` does.

    Masking `channels` shows how much there is to see. Errors are those of `verify`.
    """
    kept = Kept(combed.atoms)
    kept.remove(channels)
    return _Proof(combed, kept, other, lambda: combed.folded.model, channels, is_pruned=False).run(None)


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

    `decoy` are channels that are masked where `kept` removes too little to see anything.
    """

    def __init__(
        self,
        combed: Combed,
        kept: Kept,
        other: Model,
        reference: Callable[[], Model],
        decoy: Axis,
        *,
        is_pruned: bool = True,
    ) -> None:
        self.combed, self.kept, self.other, self.reference = combed, kept, other, reference
        self.channels, self.is_pruned = decoy, is_pruned
        self.original = combed.folded.model
        self.runner = _runner(self.original)
        self.feeds: list[Feed] = []
        self.form = _Form(lambda model: model)
        self.compared: list[Observed] = []

    def run(self, feeds: Iterable[Mapping[str, Array]] | None) -> Comparison:
        """The verdict, on inputs that are given or on random ones."""
        given = None if feeds is None else [dict(feed) for feed in feeds]
        rounding = rounding_of(self.original)
        if not rounding:
            return self.compare(given)
        session = self.runner(self.original)
        if given is None:
            given = list(working_feeds(self.combed.folded, session, runs_needed(self.form.tolerance)))
        before = execute_all(session, given[:1])
        del session
        found = self.without_rounding(given, has_integers=rounding.has_integers)
        for outputs in before:
            self.require_as_stored(given[0], outputs)
        return found

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

    def compare(self, given: list[Feed] | None) -> Comparison:
        """The verdict on the models in one form."""
        compared = observed(self.combed, self.kept, self.form.floating)
        self.compared = [one for one in compared if self.is_pruned or not one.masks]
        original = self.open(self.original)
        if given is None:
            given = list(working_feeds(self.combed.folded, original, runs_needed(self.form.tolerance)))
        self.feeds = given
        plain = execute_all(original, given)
        del original  # what it holds is not needed twice
        require_numbers([outputs[: self.outputs] for outputs in plain])
        try:
            reference, other = (self.open(model) for model in (self.reference(), self.other))
            expected, found = (execute_all(session, given) for session in (reference, other))
            runs = Runs(plain, expected, found, lambda: execute_all(reference, nudged(given)), self.decoy)
            return judge(self.compared, runs, self.form.tolerance).noted(*self.form.notes)
        except UnsupportedError as error:
            raise ProofError(f"onnxruntime runs the original but not what was made of it: {error}") from error

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
            if a.shape != b.shape and not (value is not None and value.guessed):
                raise ProofError(
                    f"output {info.name!r} has shape {list(b.shape)} after pruning, {list(a.shape)} before"
                )

    # The power of the comparison.

    def decoy(self) -> Outputs | None:
        """What the original gives with as many other channels of the same groups masked."""
        if not len(self.channels):
            return None
        kept = Kept(self.combed.atoms)
        kept.remove(self.channels)
        try:
            small = rewrite(self.combed, kept).model
            return execute_all(self.open(masked(self.combed, kept, small)), self.feeds)
        except (ProofError, UnsupportedError):  # these cannot go together
            return None


def _single(feed: Mapping[str, Array]) -> Feed:
    """Inputs with half floats as float32."""
    return {
        name: array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iu" else array
        for name, array in feed.items()
    }


def _others(combed: Combed, kept: Kept) -> Axis:
    """Channels that survive, from each group as many as are removed, as far as there are so many."""
    rng = np.random.default_rng(0)
    chosen = [np.zeros(0, np.int64)]
    for group in combed.groups:
        stays = kept.stays(group.channels.reshape(-1, 1))
        others = group.channels[stays]
        count = min(len(group) - len(others), len(others))
        chosen.append(np.sort(rng.permutation(others)[:count]))
    return np.concatenate(chosen)


def _runner(model: Model) -> Callable[[Model], Runner]:
    """What runs models of that size: onnxruntime, or pieces of them where they may be larger than memory."""
    return Piecewise if model.data_bytes() > _PIECEWISE_BYTES else partial(open_model, optimise=False)


@dataclass(frozen=True)
class Verify:
    """Prove that the pruned model computes what the masked original computes.

    Where weights have been given other values since, that is shown of what the plan makes of the original; all else
    must be the same, and these weights must be those that the plan names. `batches` batches of the data are used where
    there is data, random inputs otherwise.
    """

    batches: int = 2
    allow_inconclusive: bool = False
    name: ClassVar[str] = "verify"

    def __call__(self, state: State) -> State:
        """Fill in `verification`; raises ProofError if the model is wrong, InconclusiveError if nothing is shown."""
        combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
        feeds = None if state.data is None else data_feeds(state.original, state.data, self.batches)
        if state.repaired is not None or state.distilled is not None:
            plan = state.need("plan", "prune")
            checked = verify_files(state.original, state.model, plan, feeds, allow_inconclusive=self.allow_inconclusive)
            return replace(state, verification=checked.comparison)
        kept = Kept(combed.atoms)
        kept.remove(chosen.channels(combed))
        found = verify(combed, kept, state.model, feeds)
        return replace(state, verification=proved(found, allow_inconclusive=self.allow_inconclusive))


def proved(found: Comparison, *, allow_inconclusive: bool = False) -> Comparison:
    """The verification if it passed; raises ProofError if it failed, InconclusiveError if it shows too little."""
    if found.verdict == WRONG:
        worst = next((f for f in found.outputs if f.verdict == WRONG), None)
        where = f" in output {worst.output!r}" if worst is not None else ""
        raise ProofError(
            f"wrong: the pruned model differs from the masked original by {found.difference:.2g}{where}, "
            f"at most {found.allowed:.0e} is allowed; nothing is written. "
            "This is an internal error: please report it with the model"
        )
    if found.verdict == INCONCLUSIVE and not allow_inconclusive:
        raise InconclusiveError(
            f"inconclusive: {'; '.join(found.notes)}; nothing is written (--allow-inconclusive writes it all the same)"
        )
    return found


def data_feeds(model: Model, source: Source, batches: int) -> Iterator[Batch]:
    """The first batches of a source, without labels."""
    inputs = inputs_of(model.proto)
    size = None if source.count is None else fixed_batch(inputs)  # whole feeds are as large as they are
    for batch in itertools.islice(source.batches(size or 2), batches):
        if size is None or all(len(array) == size for array in batch.values() if array.ndim):
            yield {entry.name: batch[entry.name] for entry in inputs}


@dataclass(frozen=True)
class FileVerification:
    """Outcome of checking a pruned file against its original and its plan.

    Attributes:
        is_replay: whether all values in the file are those that the plan makes of the original.
        trained: weights that the plan names as refitted or trained, in order; they have the SHA-256 that it says.
        comparison: the mask check, of the file itself or, where weights were refitted or trained, of the replay.
        same_bytes: whether the file is the replay byte for byte; otherwise it may store the same values differently.
        measured: how far outputs of the file are from the original's, where weights were refitted or trained.

    """

    is_replay: bool
    trained: tuple[str, ...]
    comparison: Comparison
    same_bytes: bool = False
    measured: OutputDifference | None = None


def verify_files(
    original: Model,
    pruned: Model,
    plan: Plan,
    feeds: Iterable[Mapping[str, Array]] | None = None,
    *,
    allow_inconclusive: bool = False,
) -> FileVerification:
    """Check that a file is what a plan makes of an original, and that this computes what it should.

    Every value, attribute and description in the file must be what the plan makes of the original. Weights that the
    plan names as refitted or trained must have the SHA-256 that it says and be finite. Where there are none, the file
    itself is compared with the masked original. Where there are some, that is done with the replay, and the file must
    run and give finite outputs of the original's shapes.

    Raises PlanError if the plan belongs to another original, ProofError if the file is something else or a check fails,
    InconclusiveError if the comparison shows too little, unless it is allowed to.
    """
    combed, kept = planned(original, plan)
    replay = rewrite(combed, kept, plan.input_shapes).model
    plan.stamp(replay)
    require_replay(replay, pruned, plan)
    given = None if feeds is None else list(feeds)
    trained = tuple(plan.values)
    found = verify(combed, kept, replay if trained else pruned, given)
    comparison = proved(found, allow_inconclusive=allow_inconclusive)
    if not trained:
        return FileVerification(True, trained, comparison, same_bytes(replay, pruned))
    apart = measured(combed.folded, pruned, given, _runner(combed.folded.model))
    return FileVerification(False, trained, comparison, False, apart)
