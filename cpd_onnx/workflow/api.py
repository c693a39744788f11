"""The Python interface: `compress` for models in memory or on disk, and `run` for any request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from cpd_onnx.budget.targets import KINDS
from cpd_onnx.data.open import Data, source_of
from cpd_onnx.io.progress import ProgressObserver, announce, reporting
from cpd_onnx.ir.model import Model, ModelSource, in_form_of, load
from cpd_onnx.options import same_option, taking
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.iterate import Iterate, ScoringOptions
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.sessions import custom_operators
from cpd_onnx.workflow import audit, compress_files, defaults, deploy, distill, inspect, prune, requests, sweep
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow.compress import Compressed
from cpd_onnx.workflow.evidence import reproduce
from cpd_onnx.workflow.quality import outcome, search
from cpd_onnx.workflow.quality.samples import samples_of, to_fit
from cpd_onnx.workflow.requests import Request

M = TypeVar("M")
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class CompressOptions(ScoringOptions, Allocate):
    """Options of `compress`, whose arguments are these fields.

    Attributes:
        data: Samples, see `open.source_of`; None for none. With a few hundred unlabelled samples, the channels are
            removed whose loss the remaining weights can compensate, and these weights are fitted to the original;
            without samples, channels are chosen by their weights.
        train: Whether to train the result against the original (default: with data, if torch is installed). A mapping
            sets fields of `DistillOptions`, such as {"steps": 1000}.
        input_shapes: Shapes of inputs with symbolic sizes, by name.
        max_loss: Largest share of answers that may differ from the original's on samples that are held out; finds the
            smallest model within it on the way to the target. None for no bound.
        blind: Whether to choose channels and fit weights on generated inputs without data; otherwise only channels are
            removed that change no output.
        allow_inconclusive: Whether to return a model whose proof is inconclusive.
        score, repair: As on the command line; None leaves the choice to `workflow.defaults`.
        rounds: Number of rounds of scoring, pruning, repairing and training.
        progress: Function that is called with a `ProgressEvent` at the start of each step and during it.
    """

    data: Data | None = field(default=None, kw_only=False)
    train: bool | Mapping[str, Any] | None = None
    input_shapes: Mapping[str, Sequence[int]] | None = None
    max_loss: float | None = None
    blind: bool = same_option(requests.Choosing, "blind")
    allow_inconclusive: bool = same_option(requests.Choosing, "allow_inconclusive")
    score: str | None = None
    repair: bool | None = None
    rounds: int = same_option(Iterate, "rounds")
    progress: ProgressObserver | None = None


class _InKind(Protocol[P]):
    """A function that returns a model of the same type as its argument; a `Model` for a path."""

    @overload
    def __call__(self, model: str | os.PathLike[str], /, *args: P.args, **options: P.kwargs) -> Model: ...
    @overload
    def __call__(self, model: M, /, *args: P.args, **options: P.kwargs) -> M: ...


def _in_kind(function: Callable[Concatenate[Any, P], Any]) -> _InKind[P]:
    return function


@_in_kind
@taking(CompressOptions)
def compress(model: Any, options: CompressOptions) -> Any:
    """Return a smaller model, proven correct, of the same type as the argument: a `ModelProto` for a `ModelProto`.

    >>> compress("model.onnx", "train.npz", macs=0.5).save("small.onnx")  # doctest: +SKIP

    Args:
        model: Path (for which a `Model` is returned), `onnx.ModelProto`, `onnx_graphsurgeon.Graph`, `onnx_ir.Model` or
            `Model`; it is not changed.
        options: The fields of `CompressOptions`, each an argument: the fraction that may remain of `latency` (0.5 if
            no target is given), `macs`, `params`, `channels` or `bytes`, then `data`, `train`, `score`, `rounds`,
            `keep` and so on.

    Raises:
        CpdError: The model, the data or the options are invalid; InconclusiveError if the proof is inconclusive,
            ProofError if the result is wrong.
        TypeError: An argument is not an option.
    """
    return in_form_of(model, compressed_by(model, options).state.model)


@taking(CompressOptions)
def compressed(model: ModelSource, options: CompressOptions) -> Compressed:
    """Compress as `compress` does, and return all results: the model, the plan, the proof and the training losses."""
    return compressed_by(model, options)


def compressed_by(model: ModelSource, options: CompressOptions) -> Compressed:
    """Compress as `compressed` does, with the options as one object."""
    original, shapes = load(model), dict(options.input_shapes or {})
    source = None if options.data is None else source_of(options.data, original, shapes)
    has_data = source is not None
    wanted = options.train if options.train is None or isinstance(options.train, bool) else True
    training = defaults.training(wanted, has_data=has_data)
    given = dict(options.train) if isinstance(options.train, Mapping) else {}
    has_target = any(getattr(options, name) is not None for name in (*KINDS, "target"))
    decided = {} if has_target else {**outcome.usual_target(options.max_loss), "nearest": True}
    is_search = options.max_loss is not None
    samples = samples_of(source, None, defaults.HOLD_OUT if is_search else 0.0, is_search=is_search)
    fitted = to_fit(samples.fitted, original, options)
    step = compression.step_of(options, decided, given if training else None, fitted)
    state = State(original, original, shapes, fitted)
    demand = search.Demand(options.max_loss, options.blind)
    with reporting(options.progress):
        announce(*compression.announced(step, is_search=is_search))
        choice = search.choice_of(step, state, samples, demand)
        resume = compression.ResumeState(choice.plan, choice.chosen)
        return compression.compress(step, state, resume, allow_inconclusive=options.allow_inconclusive)


_WORKFLOWS: dict[type[Request], Callable[..., dict[str, Any] | None]] = {
    requests.Prune: prune.prune, requests.VerifyFile: prune.verify, requests.Apply: prune.apply,
    requests.Distill: distill.distill, requests.Compress: compress_files.compress, requests.Sweep: sweep.sweep,
    requests.Reproduce: reproduce.reproduce, requests.Audit: audit.audit, requests.Deploy: deploy.deploy,
    requests.Inspect: inspect.inspect,
}  # fmt: skip  # a table


def run(request: Request, observer: ProgressObserver | None = None) -> dict[str, Any] | None:
    """Carry out a request, write its files, and return its result as `--json` writes it.

    The observer is called with the progress, see `ProgressEvent`. Of several processes that a launcher has started, all
    but the first return None.

    Raises:
        CpdError: The files or the options are invalid, or the result is not proven.
        TypeError: The request is of a type that only the command line carries out.
    """
    if type(request) not in _WORKFLOWS:
        known = ", ".join(owner.__name__ for owner in _WORKFLOWS)
        raise TypeError(f"run takes one of {known}, got {type(request).__name__}")
    with reporting(observer) as notify, custom_operators(request.custom_ops):
        return _WORKFLOWS[type(request)](request, notify)
