"""One call for Python: what `cpd-onnx compress` does, for a model in any form and without files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

from cpd_onnx.budget.allocation import KINDS
from cpd_onnx.data.open import Data, source_of
from cpd_onnx.ir.model import Model, ModelSource, in_form_of, load
from cpd_onnx.pipeline.state import State
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow.compress import Compressed

M = TypeVar("M")
_USUAL = {"macs": 0.5}
"""The target where none is given."""


@overload
def compress(
    model: str | os.PathLike[str],
    data: Data | None = None,
    *,
    train: bool | Mapping[str, Any] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_inconclusive: bool = False,
    **options: Any,
) -> Model: ...
@overload
def compress(
    model: M,
    data: Data | None = None,
    *,
    train: bool | Mapping[str, Any] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_inconclusive: bool = False,
    **options: Any,
) -> M: ...
def compress(
    model: Any,
    data: Data | None = None,
    *,
    train: bool | Mapping[str, Any] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_inconclusive: bool = False,
    **options: Any,
) -> Any:
    """A smaller model, proven, in the form of the one that is given: a `ModelProto` for a `ModelProto`, and so on.

    >>> compress("model.onnx", "train.npz", macs=0.5).save("small.onnx")  # doctest: +SKIP

    Args:
        model: a path (a `Model` comes back), `onnx.ModelProto`, `onnx_graphsurgeon.Graph`, `onnx_ir.Model` or `Model`;
            it is not changed.
        data: samples, see `sources.source_of`. With some hundred of them, unlabelled, those channels go that the rest
            can make up for, and the rest is fitted to the original; without them channels go by their weights.
        train: whether the result is trained against the original: by default where there is data and torch. A mapping
            has fields of `DistillOptions`, as in {"steps": 1000}.
        input_shapes: sizes of inputs that the model leaves open, by name.
        allow_inconclusive: whether a model is returned of which the inputs that were tried show too little to prove it
            right or wrong.
        options: fields of `passes.iterate.Iterate`: the share that may remain of `macs` (0.5 if none is given),
            `params`, `channels`, `bytes` or `latency`, then `score`, `rounds`, `keep` and so on.

    Raises:
        CpdError: what can be acted on is wrong with the model, the data or the options; an InconclusiveError if the
            inputs show too little, a ProofError if the result is wrong.
        TypeError: there is no such option.
    """
    made = compressed(
        model, data, train=train, input_shapes=input_shapes, allow_inconclusive=allow_inconclusive, **options
    )
    return in_form_of(model, made.state.model)


def compressed(
    model: ModelSource,
    data: Data | None = None,
    *,
    train: bool | Mapping[str, Any] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_inconclusive: bool = False,
    **options: Any,
) -> Compressed:
    """As `compress`, but all that there is to know: the plan, the proof, the losses of the training."""
    original, shapes = load(model), dict(input_shapes or {})
    source = None if data is None else source_of(data, original, shapes)
    step = _step(options, train, has_data=source is not None)
    return compression.compress(step, State(original, original, shapes, source), allow_inconclusive=allow_inconclusive)


def _step(options: Mapping[str, Any], train: bool | Mapping[str, Any] | None, *, has_data: bool) -> Any:
    """The pass, with what the command line has where nothing is said."""
    wanted = train if train is None or isinstance(train, bool) else True
    repairs, trains = compression.efforts(repair=options.get("repair"), train=wanted, has_data=has_data)
    target = {} if any(options.get(kind) is not None for kind in KINDS) else _USUAL
    kind, wish = compression.choice(options.get("score"), {**target, **options}, has_data=has_data)
    training = dict(train) if isinstance(train, Mapping) else {}
    keep = wish.get("keep", ())
    wish |= {"score": kind, "repair": repairs, "keep": (keep,) if isinstance(keep, str) else tuple(keep)}
    return compression.step_of({**wish, **training}, {}) if trains else compression.step_of(wish, None)
