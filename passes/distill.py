"""Knowledge distillation: fine-tune a pruned model to reproduce the outputs of the original, without labels.

The student runs in torch through `cpd_onnx.torch`, with its initializers as parameters; the result is a new value for
each of them. The teacher runs in torch or onnxruntime.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, helper
from torch import Tensor

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.features import features_of
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data import metrics
from cpd_onnx.data.sources import LABELS, Source, check_source, inputs_of
from cpd_onnx.errors import CpdError, DataError, ModelError
from cpd_onnx.io.progress import step
from cpd_onnx.ir.interface import kept_by
from cpd_onnx.ir.model import Model, load
from cpd_onnx.options import options_from
from cpd_onnx.pipeline.state import State
from cpd_onnx.rules import FLOATS
from cpd_onnx.scores.bases import mixable_groups
from cpd_onnx.shapes.stated import stated_proto
from cpd_onnx.torch import BatchNormMode, OnnxModule, import_model, write_weights
from cpd_onnx.torch.dtypes import to_numpy, to_torch
from cpd_onnx.training import refolding
from cpd_onnx.training.cache import AnswerCache
from cpd_onnx.training.feed import Augmentation, Feed, memory_format
from cpd_onnx.training.loop import HeldOut, Progress, Run, Traces, Trainer
from cpd_onnx.training.losses import DistillationLoss, surviving
from cpd_onnx.training.options import DistillOptions, LossKind
from cpd_onnx.training.process_group import ProcessGroup, join_process_group
from cpd_onnx.training.schedule import batch_norm_mode, compared, in_parts, settled

Array: TypeAlias = npt.NDArray[Any]
Shared: TypeAlias = Mapping[str, Mapping[int, Array]]
"""Hidden tensors to compare by name: for each pruned axis, the indices of the teacher that survive."""


@dataclass(frozen=True)
class Overlap:
    """Correspondence between a teacher and its pruned student.

    Attributes:
        tensors: Hidden tensors to compare.
        filters: Surviving indices of the teacher on the first axis of each weight, by name.
        features: The last hidden tensors before the outputs, see `features_of`, with the same indices as `tensors`.

    """

    tensors: Shared = field(default_factory=dict)
    filters: Mapping[str, Array] = field(default_factory=dict)
    features: Shared = field(default_factory=dict)


_MEASURED = 20
"""Number of batches from which the moments of restored normalizations are computed (heuristic)."""


@dataclass(frozen=True)
class DistillResult:
    """Result of training.

    Attributes:
        values: New values of the changed initializers, with the types and shapes of the model.
        losses: Loss of each update.
        kinds: Kind of loss of each output; empty if hidden tensors alone were compared.
        seconds: Wall-clock time in seconds.
        device: Device of the training.
        restored: Number of batch normalizations that were restored for the training.
        compared: Hidden tensors that were compared.
        judged: Number of updates and score on held-out data, for each evaluation.
        metric: Metric of that score, see `Metric.as_json`; empty without held-out data.

    """

    values: dict[str, Array] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    kinds: dict[str, LossKind]
    seconds: float
    device: str
    restored: int = 0
    compared: tuple[str, ...] = ()
    judged: tuple[tuple[int, float], ...] = ()
    metric: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """Evaluation of the student on held-out data during training.

    Attributes:
        source: The data.
        metric: Metric, see `metrics.evaluate`.
        every: Number of updates between two evaluations.
        patience: Number of evaluations without improvement after which training stops and the best weights are the
            result; 0 means never.

    """

    source: Source
    metric: str = "top1"
    every: int = 100
    patience: int = 0


def distill(  # noqa: PLR0913  # the arguments after the options are keywords
    teacher: ModelProto,
    student: ModelProto,
    batches: Source,
    options: DistillOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    overlap: Overlap | None = None,
    watched: Watched | None = None,
    traces: Traces | None = None,
) -> DistillResult:
    """Train the student to reproduce the teacher's outputs; the state after the last step is the result.

    Args:
        teacher: The original, with its weights: any model that onnxruntime can run.
        student: The model to train, with the same inputs and outputs; it is not changed.
        batches: Training data; labels are used only with a label weight.
        options: Options of the training.
        progress: Called after some of the steps.
        overlap: Correspondence between the models, see `overlap_of`; required for `options.hidden`, and used to
            initialize restored normalizations.
        watched: Evaluation of the student during training.
        traces: Checkpoint and logs.

    Raises:
        UnsupportedError: The student cannot be imported into torch.
        DataError: The data does not fit the models.
        CpdError: The models have different signatures, or the loss became infinite or NaN.
        StoppedError: The process was interrupted; the checkpoint contains all completed steps.

    """
    options = options or DistillOptions()
    started = time.perf_counter()
    _check(teacher, student, batches, options)
    sized = stated_proto(student)
    overlap = overlap or Overlap()
    features = overlap.features if all(_makes(model, overlap.features) for model in (teacher, student)) else {}
    options = replace(options, compare=compared(options, batches, has_features=bool(features)))
    hidden = dict(itertools.islice(overlap.tensors.items(), options.hidden))
    if options.compare == "features":
        hidden |= features
    with join_process_group(options.device) as process_group, _threads(options.threads):
        torch.manual_seed(options.seed)
        feed = _feed(batches, sized, options, process_group)
        mode = batch_norm_mode(options, feed.size // process_group.size, batches)
        restored: tuple[refolding.Restored, ...] = ()
        trained_proto = _with_outputs(student, hidden)
        if mode == "restore":
            trained_proto, restored = refolding.restore(trained_proto)
        live: BatchNormMode = "frozen" if mode == "frozen" else "train"
        module = _placed(import_model(trained_proto, batch_norm=live), student, process_group)
        kept = {name: _indices(axes) for name, axes in kept_by(student).items()}
        _feed_like_original(module, [kept.get(entry.name, {}) for entry in inputs_of(student)])
        options = settled(options, feed, batches, module)
        feed = _feed(batches, sized, options, process_group)
        before = module.onnx_state()
        comparison = DistillationLoss(
            [info.name for info in student.graph.output], options.losses, options.output_weights, options.temperature,
            options.label_weight, options.ignore_label, [_indices(kept) for kept in hidden.values()],
            options.hidden_weight, kept=kept, is_of_outputs=options.compare == "outputs",
        )  # fmt: skip  # the fields in order
        if mode == "calibrate":
            refolding.calibrate(module, (inputs for inputs, _ in itertools.islice(feed.batches(), options.steps)))
            losses: list[float] = []
            judged: list[tuple[int, float]] = []
        else:
            if restored:
                _begin(module, restored, teacher, feed, overlap)
            trainer = Trainer(
                module, _teacher(_with_outputs(teacher, hidden), options, process_group), comparison, options,
                process_group, freeze=options.freeze, in_parts=in_parts(feed, module),
            )  # fmt: skip
            with step("distill", is_whole=True):
                losses = trainer.train(
                    feed,
                    options.steps or 0,
                    traces=traces,
                    identity=_identity(teacher, student, options, process_group),
                    held_out=None if watched is None else _held_out(sized, watched, teacher, restored),
                    progress=progress,
                )
            judged = trainer.judged
        after = refolding.refold(module.onnx_state(), restored)
    values = {name: value for name, value in after.items() if value.tobytes() != before[name].tobytes()}
    seconds = time.perf_counter() - started
    kinds = comparison.kinds if comparison.is_of_outputs else {}
    return DistillResult(
        values, tuple(losses), kinds, seconds, str(process_group.device), len(restored), tuple(hidden),
        tuple(judged), {} if watched is None else metrics.metric_of(watched.metric).as_json(),
    )  # fmt: skip  # the fields in order


def summary(result: DistillResult) -> dict[str, Any]:
    """Return the result of training without the values."""
    steps = {"steps": len(result.losses), "seconds": round(result.seconds, 2), "device": result.device}
    losses = {"first_loss": result.losses[0], "last_loss": result.losses[-1]} if result.losses else {}
    return steps | losses | {
        "losses": dict(result.kinds), "restored": result.restored, "compared": list(result.compared), **result.metric
    }  # fmt: skip


def trained(student: Model, result: DistillResult) -> Model:
    """Return the student with the trained values; nothing else changes."""
    model = student.copy()
    rest = {}
    for name, value in result.values.items():
        if model.has(name):
            model.set_array(name, value)
        else:
            rest[name] = value
    return load(write_weights(model.complete_proto(), rest)) if rest else model


@dataclass(frozen=True)
class Distill(DistillOptions):
    """Fine-tune the pruned model against the original; its options are those of `DistillOptions`."""

    name: ClassVar[str] = "distill"
    provides: ClassVar[tuple[str, ...]] = ("distilled",)

    def __call__(self, state: State) -> State:
        """Train `model` with `original` as teacher on `data`; fills in `distilled`."""
        if state.data is None:
            raise DataError("distillation needs data: give --data, or a source as `data`")
        options = options_from(DistillOptions, self)
        overlap = None
        if state.combed is not None and state.allocation is not None:
            overlap = overlap_of(state.combed, state.allocation.keep_mask(state.combed), options.hidden)
        teacher, student = state.original.complete_proto(), state.model.complete_proto()
        result = distill(teacher, student, state.data, options, overlap=overlap)
        model = trained(state.model, result)
        plan = state.plan and state.plan.with_values(state.model, model)
        return replace(state, model=model, distilled=summary(result), plan=plan)


def overlap_of(combed: Combed, kept: KeepMask, hidden: int = 0) -> Overlap:
    """Return the correspondence between a model and its pruned version, with that many hidden tensors."""
    mixable = [index for index, each in mixable_groups(combed).items() if kept.shrinks(each.group.channels)]

    def is_mixed(axis: Axis) -> bool:
        """Return whether the channels that survive may be combinations of the teacher's, of which each has none."""
        return bool(np.isin(combed.owners[0][combed.atoms.parts(axis)], mixable).any())

    filters = {
        weight.value.name: np.flatnonzero(kept.mask(weight.axes[0][0]))
        for weight in combed.weights
        if weight.is_trained and not weight.scope.address and len(weight.shape) > 2 and not is_mixed(weight.axes[0][0])
    }
    tensors = _shared_tensors(combed, kept, hidden) if hidden else {}
    features = {name: _survivors(combed, kept, name) for name in features_of(combed)}
    if not all(indices.size for axes in features.values() for indices in axes.values()):
        features = {}  # an output no longer depends on the inputs
    mixed = {name for name in (*tensors, *features) if any(map(is_mixed, combed.tensors[("", name)].axes or []))}
    tensors = {name: axes for name, axes in tensors.items() if name not in mixed}
    return Overlap(tensors, filters, {} if mixed & features.keys() else features)


def _shared_tensors(combed: Combed, kept: KeepMask, count: int) -> dict[str, dict[int, Array]]:
    """Return up to `count` pruned hidden tensors, evenly distributed over the depth of the network.

    For each group of channels the last tensor that it runs through is a candidate: after the sum and the activation.
    """
    scope = combed.folded.scope
    candidates: dict[tuple[int, ...], str] = {}
    for node in scope.nodes:
        for name in node.output:
            tensor = combed.tensors.get((scope.path, name))
            if tensor is None or not tensor.axes or tensor.value.dtype not in FLOATS or name in scope.outputs:
                continue
            shrunk = [axis for axis in tensor.axes if kept.shrinks(axis)]
            if len(shrunk) == 1 and tensor.value.constants is None:
                candidates[tuple(sorted(set(combed.atoms.parts(shrunk[0]).ravel().tolist())))] = name
    names = list(candidates.values())
    order = {name: place for place, node in enumerate(scope.nodes) for name in node.output}
    names.sort(key=order.__getitem__)
    chosen = [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(min(count, len(names)))]
    return {name: _survivors(combed, kept, name) for name in dict.fromkeys(chosen)}


def _survivors(combed: Combed, kept: KeepMask, name: str) -> dict[int, Array]:
    """Return the surviving indices of a tensor of the main graph, by pruned axis."""
    axes = combed.tensors[("", name)].axes or []
    return {i: np.flatnonzero(kept.mask(a)) for i, a in enumerate(axes) if kept.shrinks(a)}


# Preparation of the training.


def _check(teacher: ModelProto, student: ModelProto, batches: Source, options: DistillOptions) -> None:
    """Check models, data and options; raises CpdError."""
    inputs = inputs_of(student)
    names = [{entry.name for entry in entries} for entries in (inputs_of(teacher), inputs)]
    outputs = [[info.name for info in model.graph.output] for model in (teacher, student)]
    if names[0] != names[1] or outputs[0] != outputs[1]:
        raise ModelError(
            f"teacher and student differ: inputs {sorted(names[0])} and {sorted(names[1])}, "
            f"outputs {outputs[0]} and {outputs[1]}; give two models of the same signature"
        )
    for what, given in (("losses", options.losses), ("weights", options.output_weights)):
        unknown = sorted(set(given) - set(outputs[1]))
        if unknown:
            raise CpdError(f"{what} are given for {unknown}, but the model's outputs are {outputs[1]}")
    check_source(batches, inputs_of(teacher))
    if options.teacher_cache is not None and (options.flip or options.shift or (options.crop or 1) < 1):
        raise CpdError("a teacher cache needs the same images in every epoch: leave out the augmentation, or the cache")
    if options.label_weight and LABELS not in next(iter(batches.batches(1))):
        raise DataError(f"label weight {options.label_weight:g} needs an array {LABELS!r} in the data; there is none")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set the number of CPU threads of torch in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _feed(batches: Source, student: ModelProto, options: DistillOptions, process_group: ProcessGroup) -> Feed:
    augmentation = Augmentation(options.flip, options.shift, options.crop or 1)
    return Feed(batches, student, options.batch_size, process_group, seed=options.seed, augmentation=augmentation)


def _makes(model: ModelProto, names: Iterable[str]) -> bool:
    """Return whether nodes of the main graph make all of these tensors; those of a local function are not there."""
    return {name for node in model.graph.node for name in node.output}.issuperset(names)


def _with_outputs(model: ModelProto, hidden: Shared) -> ModelProto:
    """Return the model with hidden tensors as additional outputs."""
    if not hidden:
        return model
    extended = ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in hidden)
    return extended


def _indices(kept: Mapping[int, npt.ArrayLike]) -> dict[int, Tensor]:
    return {axis: torch.from_numpy(np.asarray(indices, np.int64)) for axis, indices in kept.items()}


def _feed_like_original(module: OnnxModule, kept: Sequence[Mapping[int, Tensor]]) -> None:
    """Let a module take the inputs of the original, of which it has the given indices, by axis."""
    if any(kept):
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(surviving(each, axes) for each, axes in zip(inputs, kept, strict=True))
        )


def _begin(
    module: OnnxModule, restored: Sequence[refolding.Restored], teacher: ModelProto, feed: Feed, overlap: Overlap
) -> None:
    """Initialize restored normalizations with the moments of the teacher at the same places, where these are known."""
    batches = [inputs for inputs, _ in itertools.islice(feed.batches(), _MEASURED)]
    own = refolding.measure(module, restored, batches)
    wanted: dict[str, refolding.InputMoments] = {}
    proto, there = refolding.restore(teacher)
    common = {entry.weight for entry in restored} & set(overlap.filters)
    if common and common <= {entry.weight for entry in there}:
        original = import_model(proto, batch_norm="train").to(feed.process_group.device)
        for name, moments in refolding.measure(original, there, batches).items():
            if name in common:
                kept = torch.from_numpy(overlap.filters[name]).to(feed.process_group.device)
                wanted[name] = refolding.InputMoments(moments.mean[kept], moments.var[kept])
    refolding.begin(module, restored, own, wanted)


def _teacher(model: ModelProto, options: DistillOptions, process_group: ProcessGroup) -> Run:
    """Return the teacher as a function without gradients."""
    answer = _running(model, options, process_group)
    return answer if options.teacher_cache is None else AnswerCache(options.teacher_cache, answer, _digest(model))


def _running(model: ModelProto, options: DistillOptions, process_group: ProcessGroup) -> Run:
    """Return the teacher running in torch or onnxruntime."""
    makers: dict[str, Callable[[ModelProto, ProcessGroup], Run]] = {"torch": _in_torch, "onnxruntime": _in_onnxruntime}
    if options.teacher_runtime != "auto":
        return makers[options.teacher_runtime](model, process_group)
    first, second = ("onnxruntime", "torch") if process_group.device.type == "cpu" else ("torch", "onnxruntime")
    try:
        return makers[first](model, process_group)
    except CpdError:
        return makers[second](model, process_group)


def _in_torch(model: ModelProto, process_group: ProcessGroup) -> Run:
    module = _placed(import_model(model), model, process_group).eval().requires_grad_(False)
    return lambda inputs: module(*inputs)


def _placed(module: OnnxModule, model: ModelProto, process_group: ProcessGroup) -> OnnxModule:
    """Return the module of a model on the device, in the memory format in which its convolutions are fastest."""
    layout = memory_format(model, process_group.device)
    placed: OnnxModule = module.to(process_group.device)
    for tensor in (*placed.parameters(), *placed.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=layout)
    return placed


def _in_onnxruntime(model: ModelProto, process_group: ProcessGroup) -> Run:
    session = metrics.open_session(model, torch.get_num_threads())
    names = [entry.name for entry in inputs_of(model)]
    return lambda inputs: [
        to_torch(output).to(process_group.device)
        for output in metrics.run(session, {name: to_numpy(x) for name, x in zip(names, inputs, strict=True)})
    ]


def _held_out(
    student: ModelProto, watched: Watched, teacher: ModelProto, restored: Sequence[refolding.Restored]
) -> HeldOut:
    metric = metrics.metric_of(watched.metric)
    reference = stated_proto(teacher) if metric.of_two_models else None

    def judge(state: Mapping[str, Array]) -> float:
        model = write_weights(student, refolding.refold(state, restored))
        return metrics.evaluate(model, watched.source, watched.metric, reference=reference)

    return HeldOut(judge, watched.every, watched.patience, metric.lower_is_better)


def _identity(teacher: ModelProto, student: ModelProto, options: DistillOptions, process_group: ProcessGroup) -> str:
    """Return the identity of a run: a digest of the models, the options and the number of processes."""
    digest = hashlib.sha256(
        repr((replace(options, device="", threads=0, teacher_cache=None), process_group.size)).encode()
    )
    for model in (teacher, student):
        digest.update(_digest(model))
    return digest.hexdigest()


def _digest(model: ModelProto) -> bytes:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).digest()


__all__ = [
    "Distill", "DistillOptions", "DistillResult", "Overlap", "Progress", "Traces", "Watched", "distill", "overlap_of",
    "summary", "trained",
]  # fmt: skip  # Progress and Traces are what callers need of the training loop
