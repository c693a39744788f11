"""The step of a deployment that multiplies linear operators into one, by what that saves on the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from onnx import helper, numpy_helper

from cpd_onnx.deploy.converting import Notify, require_one_message
from cpd_onnx.ir.model import Array, Model, load
from cpd_onnx.rewrite.linear_runs import LinearRun
from cpd_onnx.rewrite.merging import Saving, merge, merge_again, saved_bytes, saved_macs
from cpd_onnx.runtime.sessions import judged_feed, latency_ratio, open_model
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.values import Folded

Rounds: TypeAlias = Sequence[Sequence[Sequence[str]]]
"""Linear runs that were merged, as `Merged.rounds` names them."""
MEASURES = ("macs", "bytes", "latency")
"""What the operator in place of several must save: multiply-accumulates, bytes of weights, or time measured here."""
_SECONDS = 0.5
"""Seconds for which a run is timed beside its operator, in turns; a heuristic."""
_FASTER = 0.97
"""Ratio of the times below which the operator is taken for faster; the rest is noise (heuristic)."""
_WITHOUT_INPUTS = 4
"""IR version from which an initializer need not be an input of its graph."""
_WORTH_TIMING = 4.0
"""Ratio of the multiply-accumulates up to which an operator is timed; a heuristic, as few kernels are so uneven."""


def merged(model: Model, measure: str, notify: Notify) -> tuple[Model, Mapping[str, Any]]:
    """Return the model with linear operators multiplied into one, and the options with which `merged_again` repeats it.

    With nothing to merge, or if the whole model is slower then, it is the given one. What became part of what, and what
    did not and why, goes to `notify`.

    Raises UnsupportedError if the model is over 2 GiB.
    """
    require_one_message(model, "merged")
    made = merge(model, _SAVINGS[measure]())
    options = {"measure": measure, "rounds": [[list(pair) for pair in pairs] for pairs in made.rounds]}
    notes = list(made.notes) or ["no two linear operators have nothing but affine ones between them"]
    if measure == "latency" and made.rounds:
        before, after = _times(model, made.model)
        times = f"{1000 * before:.3g} -> {1000 * after:.3g} ms for the whole model"
        if after > before:
            notify(f"nothing was merged, as it would take longer: {times}")
            return model, options
        notes.append(times)
    for note in notes:
        notify(note)
    return made.model, options


def _times(*models: Model) -> list[float]:
    """Return the seconds that a run of each model takes on one thread; the inputs are those of the first."""
    feed = judged_feed(fold(models[0], evaluates=False), open_model(models[0]))
    return latency_ratio(models, feed, seconds=_SECONDS, threads=1)


def merged_again(model: Model, measure: str, rounds: Rounds) -> Model:
    """Repeat the step without measuring; raises ValueError if the model does not have these runs."""
    if measure not in MEASURES:
        raise ValueError(f"the measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    return merge_again(model, rounds)


class _SavedSeconds:
    """Times runs beside their operators in onnxruntime, each as a model of its own."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(self, run: LinearRun, folded: Folded) -> float:
        """Return the seconds that a run saves as one operator; 0 if they are within the noise."""
        if run.after.macs > _WORTH_TIMING * run.before.macs:
            return 0.0
        apart = _apart(run, folded)
        key = (run.pair, apart.sha256())
        if key not in self._known:
            before, after = _times(apart, merge_again(apart, [[run.pair]]))
            self._known[key] = before - after if after < _FASTER * before else 0.0
        return self._known[key]


_SAVINGS: dict[str, Callable[[], Saving]] = {
    "macs": lambda: saved_macs, "bytes": lambda: saved_bytes, "latency": _SavedSeconds
}  # fmt: skip  # a table


def _apart(run: LinearRun, folded: Folded) -> Model:
    """Return a run as a model, at the sizes that were inferred first."""
    scope, last = folded.scope, run.second.position if run.sum is None else max(run.second.position, run.sum)
    data, out = (scope.values[name] for name in (scope.nodes[run.first.position].input[0], scope.nodes[last].output[0]))
    positions, waiting = set(run.nodes), [name for at in run.nodes for name in scope.nodes[at].input]
    weights: dict[str, Array] = {}
    while waiting:
        name = waiting.pop()
        if name and folded.model.has(name):
            weights[name] = folded.model.array(name)
        elif name not in ("", data.name) and (position := scope.producers[name]) not in positions:
            positions.add(position)
            waiting += scope.nodes[position].input
    start, end = ([helper.make_tensor_value_info(each.name, each.dtype, each.shape)] for each in (data, out))
    stored = [numpy_helper.from_array(array, name) for name, array in sorted(weights.items())]
    graph = helper.make_graph([scope.nodes[position] for position in sorted(positions)], "run", start, end, stored)
    proto = folded.model.proto
    version = max(proto.ir_version, _WITHOUT_INPUTS)
    return load(helper.make_model(graph, opset_imports=proto.opset_import, ir_version=version))
