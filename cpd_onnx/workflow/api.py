"""For Python: what `cpd-onnx compress` does in one call, for a model in any form and without files; and any request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from cpd_onnx.budget.allocation import KINDS
from cpd_onnx.data.open import Data, source_of
from cpd_onnx.ir.model import Model, ModelSource, in_form_of, load
from cpd_onnx.options import again, taking
from cpd_onnx.passes.allocate import Allocate, target_options
from cpd_onnx.passes.iterate import Iterate, ScoringOptions
from cpd_onnx.pipeline.state import State
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import compress_files, defaults, deploy, distill, prune, reproduce, requests, sweep
from cpd_onnx.workflow.compress import Compressed
from cpd_onnx.workflow.requests import Observer, Request, ignore

M = TypeVar("M")
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class CompressOptions(ScoringOptions, Allocate):
    """What `compress` can be told: the arguments of that function are these fields.

    Attributes:
        data: samples, see `open.source_of`. With some hundred of them, unlabelled, those channels go that the rest can
            make up for, and the rest is fitted to the original; without them channels go by their weights.
        train: whether the result is trained against the original: by default where there is data and torch. A mapping
            has fields of `DistillOptions`, as in {"steps": 1000}.
        input_shapes: sizes of inputs that the model leaves open, by name.
        allow_inconclusive: whether a model is returned of which the inputs that were tried show too little to prove it
            right or wrong.
        score, repair: as on the command line; None leaves them to `workflow.defaults`.
    """

    data: Data | None = field(default=None, kw_only=False)
    train: bool | Mapping[str, Any] | None = None
    input_shapes: Mapping[str, Sequence[int]] | None = None
    allow_inconclusive: bool = again(requests.Choosing, "allow_inconclusive")
    score: str | None = None
    repair: bool | None = None
    rounds: int = again(Iterate, "rounds")


class _InKind(Protocol[P]):
    """A function that gives a model in the form of the one that it is given."""

    @overload
    def __call__(self, model: str | os.PathLike[str], /, *args: P.args, **options: P.kwargs) -> Model: ...
    @overload
    def __call__(self, model: M, /, *args: P.args, **options: P.kwargs) -> M: ...


def _in_kind(function: Callable[Concatenate[Any, P], Any]) -> _InKind[P]:
    return function


@_in_kind
@taking(CompressOptions)
def compress(model: Any, options: CompressOptions) -> Any:
    """A smaller model, proven, in the form of the one that is given: a `ModelProto` for a `ModelProto`, and so on.

    >>> compress("model.onnx", "train.npz", macs=0.5).save("small.onnx")  # doctest: +SKIP

    Args:
        model: a path (a `Model` comes back), `onnx.ModelProto`, `onnx_graphsurgeon.Graph`, `onnx_ir.Model` or `Model`;
            it is not changed.
        options: the fields of `CompressOptions`, each an argument: the share that may remain of `macs` (0.5 if none is
            given), `params`, `channels`, `bytes` or `latency`, then `data`, `train`, `score`, `rounds`, `keep` and so
            on.

    Raises:
        CpdError: what can be acted on is wrong with the model, the data or the options; an InconclusiveError if the
            inputs show too little, a ProofError if the result is wrong.
        TypeError: there is no such option.
    """
    return in_form_of(model, compressed_by(model, options).state.model)


@taking(CompressOptions)
def compressed(model: ModelSource, options: CompressOptions) -> Compressed:
    """As `compress`, but all that there is to know: the plan, the proof, the losses of the training."""
    return compressed_by(model, options)


def compressed_by(model: ModelSource, options: CompressOptions) -> Compressed:
    """The same, with the options as an object."""
    original, shapes = load(model), dict(options.input_shapes or {})
    source = None if options.data is None else source_of(options.data, original, shapes)
    has_data = source is not None
    wanted = options.train if options.train is None or isinstance(options.train, bool) else True
    training = defaults.training(wanted, has_data=has_data)
    given = dict(options.train) if isinstance(options.train, Mapping) else {}
    has_target = any(getattr(options, kind) is not None for kind in KINDS)
    decided: dict[str, Any] = {} if has_target else target_options(*defaults.TARGET)
    step = compression.step_of(options, decided, given if training else None, has_data=has_data)
    state = State(original, original, shapes, source)
    return compression.compress(step, state, allow_inconclusive=options.allow_inconclusive)


_CARRIED_OUT: dict[type[Request], Callable[..., dict[str, Any] | None]] = {
    requests.Prune: prune.prune, requests.VerifyFile: prune.verify, requests.Apply: prune.apply,
    requests.Distill: distill.distill, requests.Compress: compress_files.compress, requests.Sweep: sweep.sweep,
    requests.Reproduce: reproduce.reproduce, requests.Deploy: deploy.deploy,
}  # fmt: skip  # a table


def run(request: Request, observer: Observer = ignore) -> dict[str, Any] | None:
    """Carry out a request, and write what it asks for; what there is to say about it, as its `--json` has it.

    The observer is told how far it is. Nothing is given back in a process of a training run that is not the first.

    Raises:
        CpdError: what can be acted on is wrong with the files or the options.
        TypeError: it is none that is carried out from here.
    """
    if type(request) not in _CARRIED_OUT:
        known = ", ".join(owner.__name__ for owner in _CARRIED_OUT)
        raise TypeError(f"a {type(request).__name__} is not carried out here, but {known}")
    return _CARRIED_OUT[type(request)](request, observer)
