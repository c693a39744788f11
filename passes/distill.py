"""Knowledge distillation: fine-tune a pruned model until it answers like the original, without labels.

Both models run in torch through `cpd_onnx.torch`; the student's initializers are the parameters, so what comes out is a
new value for each of them. Outputs that are scores of classes are compared by the Kullback-Leibler divergence of their
softened distributions (Hinton et al., arXiv 1503.02531), all others by the mean squared error.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F

from cpd_onnx import metrics
from cpd_onnx.data import LABELS, Batch, Source, check_source, fixed_batch, inputs_of, steps_per_pass
from cpd_onnx.errors import CpdError, DataError, ModelError, UnsupportedError
from cpd_onnx.graph import Model, load
from cpd_onnx.state import State
from cpd_onnx.torch import BatchNormMode, OnnxModule, import_model, write_weights
from cpd_onnx.torch.dtypes import to_numpy, to_torch

Array: TypeAlias = npt.NDArray[Any]
Run: TypeAlias = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
LossKind: TypeAlias = Literal["kl", "mse"]

IGNORED = metrics.IGNORED


@dataclass(frozen=True)
class DistillOptions:
    """How to train.

    Attributes:
        epochs: passes over the data.
        steps: updates in all; takes the place of `epochs`.
        batch_size: samples in an update; a model that fixes its batch size gets that one.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
        lr: learning rate after the warm-up, from where it falls to zero along a cosine.
        warmup: share of the steps in which the learning rate rises from zero.
        weight_decay: on tensors of two axes or more.
        clip_norm: largest norm of the gradient; 0 leaves it as it is.
        temperature: softens the distributions that are compared.
        label_weight: share of the cross-entropy with the labels in the loss; 0 needs no labels.
        losses: output name -> "kl" or "mse", for outputs whose nature cannot be seen from their values.
        batch_norm: "frozen" keeps BatchNormalization's stored statistics; "train" trains with those of the batch;
            "auto" does the latter where a batch has at least 16 samples.
        freeze: initializers that are not trained, by name.
        flip: mirror half of the images (rank-4 inputs, width last).
        shift: move images by up to so many pixels, zeros coming in.
        seed: of order and augmentation.
        device: "auto" takes a GPU if there is one.
        mixed_precision: compute in bfloat16 where that is safe, on a GPU.
        threads: of torch on the CPU; 0 leaves its choice. For small models, or on a busy machine, 1 is fastest.
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    temperature: float = 4.0
    label_weight: float = 0.0
    losses: Mapping[str, LossKind] = field(default_factory=dict)
    batch_norm: BatchNormMode | Literal["auto"] = "auto"
    freeze: tuple[str, ...] = ()
    flip: bool = False
    shift: int = 0
    seed: int = 0
    device: str = "auto"
    mixed_precision: bool = False
    threads: int = 0


@dataclass(frozen=True)
class Progress:
    """Where the training is: updates done, updates in all, and the loss of the last one."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class DistillResult:
    """What training gave.

    Attributes:
        values: initializer -> new value, for those that changed; types and shapes are the model's.
        losses: loss of each update.
        kinds: output -> how it was compared.
        seconds: wall-clock time.
        device: where it ran.
    """

    values: dict[str, Array]
    losses: tuple[float, ...]
    kinds: dict[str, LossKind]
    seconds: float
    device: str


_ENOUGH_FOR_STATISTICS = 16
"""Samples in a batch from which on its own statistics are good enough to train with."""
_CHECK_EVERY = 20
"""Updates between two looks at the losses; each look waits for the device."""


def distill(
    teacher: ModelProto,
    student: ModelProto,
    batches: Source,
    options: DistillOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> DistillResult:
    """Train the student to give the teacher's outputs; the state after the last step is the result.

    Args:
        teacher: the original, with its weights; it may be any model that onnxruntime runs.
        student: the model to train, with the same inputs and outputs; it is not changed.
        batches: training data; labels are used only with a label weight.
        options: see `DistillOptions`.
        progress: called now and then.

    Raises:
        UnsupportedError: the student cannot be imported into torch.
        DataError: the data does not fit the models.
        CpdError: the models do not fit each other, or the loss became infinite or NaN.
    """
    options = options or DistillOptions()
    started = time.perf_counter()
    _check(teacher, student, batches, options)
    device = _device(options)
    feed = _Feed(batches, student, options, device)
    module = import_model(student, batch_norm=_batch_norm(options, feed.size)).to(device)
    before = module.onnx_state()
    run = _Trainer(module, _teacher(teacher, device), options, [info.name for info in student.graph.output])
    with _threads(options.threads):
        losses = run.train(feed, progress)
    after = module.onnx_state()
    values = {name: value for name, value in after.items() if value.tobytes() != before[name].tobytes()}
    return DistillResult(values, tuple(losses), run.kinds, time.perf_counter() - started, str(device))


def summary(result: DistillResult) -> dict[str, Any]:
    """What training gave, without the values."""
    losses = {"first_loss": result.losses[0], "last_loss": result.losses[-1], "losses": dict(result.kinds)}
    return {"steps": len(result.losses), "seconds": round(result.seconds, 2), "device": result.device, **losses}


def trained(student: Model, result: DistillResult) -> Model:
    """The student with the values that training gave; nothing else changes."""
    made = student.copy()
    rest = {}
    for name, value in result.values.items():
        if made.has(name):
            made.set_array(name, value)
        else:
            rest[name] = value
    return load(write_weights(made.complete_proto(), rest)) if rest else made


@dataclass(frozen=True)
class Distill(DistillOptions):
    """Fine-tune the pruned model against the original; its options are those of `DistillOptions`."""

    name: ClassVar[str] = "distill"

    def __call__(self, state: State) -> State:
        """Train `model` with `original` as teacher on `data`; fills in `distilled`."""
        if state.data is None:
            raise DataError("distillation needs data: give --data, or a source as `data`")
        options = DistillOptions(**{f.name: getattr(self, f.name) for f in fields(DistillOptions)})
        result = distill(state.original.complete_proto(), state.model.complete_proto(), state.data, options)
        return replace(state, model=trained(state.model, result), distilled=summary(result))


def _check(teacher: ModelProto, student: ModelProto, batches: Source, options: DistillOptions) -> None:
    """Refuse before anything starts."""
    inputs = inputs_of(student)
    names = [{entry.name for entry in entries} for entries in (inputs_of(teacher), inputs)]
    outputs = [[info.name for info in model.graph.output] for model in (teacher, student)]
    if names[0] != names[1] or outputs[0] != outputs[1]:
        raise ModelError(
            f"teacher and student differ: inputs {sorted(names[0])} and {sorted(names[1])}, "
            f"outputs {outputs[0]} and {outputs[1]}; give two models of the same signature"
        )
    unknown = sorted(set(options.losses) - set(outputs[1]))
    if unknown:
        raise CpdError(f"losses are given for {unknown}, but the model's outputs are {outputs[1]}")
    check_source(batches, inputs)
    if options.label_weight and LABELS not in next(iter(batches.batches(1))):
        raise DataError(f"label weight {options.label_weight:g} needs an array {LABELS!r} in the data; there is none")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many CPU threads in torch, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch_norm(options: DistillOptions, batch_size: int) -> BatchNormMode:
    if options.batch_norm == "auto":
        return "train" if batch_size >= _ENOUGH_FOR_STATISTICS else "frozen"
    return options.batch_norm


def _device(options: DistillOptions) -> torch.device:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise CpdError(f"device {options.device!r} was asked for but torch finds no GPU; use 'auto' or 'cpu'")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(options.device)
    except RuntimeError as error:
        raise CpdError(f"torch knows no device {options.device!r}; use 'auto', 'cpu' or 'cuda'") from error


def _teacher(model: ModelProto, device: torch.device) -> Run:
    """The teacher as a function without gradients: in torch, or in onnxruntime where torch lacks an operator."""
    try:
        module = import_model(model)
    except UnsupportedError:
        return _in_onnxruntime(model, device)
    module.to(device).eval().requires_grad_(False)
    names = [entry.name for entry in inputs_of(model)]
    return lambda feed: module(*(feed[name] for name in names))


def _in_onnxruntime(model: ModelProto, device: torch.device) -> Run:
    session = metrics.open_session(model)
    return lambda feed: [
        to_torch(output).to(device)
        for output in metrics.run(session, {name: to_numpy(tensor) for name, tensor in feed.items()})
    ]


# Data.


class _Feed:
    """Endless batches on the device, augmented; one pass after the other, each in an order of its own."""

    def __init__(self, source: Source, model: ModelProto, options: DistillOptions, device: torch.device) -> None:
        inputs = inputs_of(model)
        fixed = fixed_batch(inputs)
        self.source, self.options, self.device = source, options, device
        self.size = fixed or min(options.batch_size, source.count or options.batch_size)
        if source.count is not None and source.count < self.size:
            raise DataError(f"the model takes {fixed} samples at a time but the data has only {source.count}")
        self.names = [entry.name for entry in inputs]
        self.images = {entry.name for entry in inputs if entry.shape is not None and len(entry.shape) == 4}
        self.generator = np.random.default_rng(options.seed)

    @property
    def steps(self) -> int:
        """Updates in all."""
        per_pass = steps_per_pass(self.source, self.size)
        if self.options.steps is not None:
            return self.options.steps
        if per_pass is None:
            raise DataError("the data does not say how long it is; say how many steps to train")
        return per_pass * self.options.epochs

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Inputs by name, and labels where there are any and they count."""
        for epoch in itertools.count():
            empty = True
            for batch in self.source.batches(self.size, seed=self.options.seed + epoch):
                if self._full(batch):
                    empty = False
                    yield self._tensors(batch)
            if empty:
                raise DataError(f"the data gave no batch of {self.size} samples in its pass {epoch + 1}")

    def _full(self, batch: Batch) -> bool:
        """Whether the batch has the wanted size; a source that does not know its length makes its own batches."""
        return self.source.count is None or all(
            len(batch[name]) == self.size for name in self.names if batch[name].ndim
        )

    def _tensors(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.images and (self.options.flip or self.options.shift):
            batch = augment(batch, self.images, self.options, self.generator)
        feed = {name: to_torch(batch[name]).to(self.device, non_blocking=True) for name in self.names}
        labels = to_torch(batch[LABELS]).long().to(self.device) if self.options.label_weight else None
        return feed, labels


def augment(batch: Batch, images: set[str], options: DistillOptions, generator: np.random.Generator) -> Batch:
    """Mirror and move each sample's images [N, C, H, W], and its label map [N, H, W] if it has one, alike."""
    count = next(len(batch[name]) for name in images)
    flips = generator.random(count) < 0.5 if options.flip else np.zeros(count, bool)
    moves = generator.integers(-options.shift, options.shift + 1, (count, 2))
    result = dict(batch)
    maps = {LABELS} if LABELS in batch and batch[LABELS].ndim == 3 else set()
    for name in images | maps:
        fill = IGNORED if name == LABELS else 0
        samples = zip(batch[name], flips, moves, strict=True)
        result[name] = np.stack([_moved(x[..., ::-1] if flip else x, move, fill) for x, flip, move in samples])
    return result


def _moved(x: Array, move: Array, fill: int) -> Array:
    """Shift the last two axes by (down, right), filling what comes in."""
    down, right = (int(step) for step in move)
    height, width = x.shape[-2:]
    result = np.full_like(x, fill)
    target = (slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0)))
    source = (slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0)))
    result[(..., *target)] = x[(..., *source)]
    return result


# Losses.


def class_axis(output: Tensor) -> int | None:
    """Axis of the classes of an output that can be scores: the last of two; of four, 1 or 3, whichever is shorter."""
    if output.ndim == 2:
        axis = 1
    elif output.ndim == 4:
        axis = 1 if output.shape[1] <= output.shape[3] else 3
    else:
        return None
    return axis if output.shape[axis] > 1 else None


def kind_of(output: Tensor) -> LossKind:
    """How to compare an output, seen from the teacher's values: several numbers in 0..1 that are no distribution are
    independent probabilities, not scores of classes."""
    axis = class_axis(output)
    if axis is None or not output.is_floating_point():
        return "mse"
    independent = bool(((output >= 0) & (output <= 1)).all()) and not is_distribution(output, axis)
    return "mse" if independent else "kl"


def is_distribution(output: Tensor, axis: int) -> bool:
    """Whether an output has gone through a softmax already."""
    total = output.float().sum(axis)
    return bool((output >= 0).all()) and bool(((total - 1).abs() < 1e-2).all())


def divergence(student: Tensor, teacher: Tensor, axis: int, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened distributions, summed over classes, averaged over all else, times T²."""
    logs = (student.float() / temperature).log_softmax(axis)
    target = (teacher.float() / temperature).log_softmax(axis)
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(axis).mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error in units of the teacher's mean square, so that outputs of all scales weigh the same."""
    target = teacher.float()
    return F.mse_loss(student.float(), target) / target.square().mean().clamp(min=1e-12)


def label_loss(student: Tensor, labels: Tensor, axis: int) -> Tensor:
    """Cross-entropy with labels, of which `IGNORED` do not count."""
    logs = student.float().log_softmax(axis).movedim(axis, 1)
    if logs.shape[:1] + logs.shape[2:] != labels.shape:
        raise DataError(
            f"labels have shape {list(labels.shape)} but the output {list(student.shape)}, with classes in axis {axis}"
        )
    return F.nll_loss(logs, labels, ignore_index=IGNORED)


_SMALLEST = 1e-7
"""Probability below which an output counts as this."""


# Training.


class _Trainer:
    """One training run: the student, the optimiser and how each output is compared."""

    def __init__(self, module: OnnxModule, teacher: Run, options: DistillOptions, outputs: Sequence[str]) -> None:
        self.module, self.teacher, self.options, self.outputs = module, teacher, options, list(outputs)
        self.kinds: dict[str, LossKind] = {}
        self.distributions: set[str] = set()
        self.weights = _Weights(module, options)

    def train(self, feed: _Feed, progress: Callable[[Progress], None] | None) -> list[float]:
        """Run all steps; the losses of all of them."""
        steps = feed.steps
        optimizer = _optimizer(self.weights.masters, self.options)
        recent: list[Tensor] = []
        losses: list[float] = []
        self.module.train()
        for step, (inputs, labels) in enumerate(itertools.islice(feed.batches(), steps)):
            rate = self.options.lr * schedule(step, steps, self.options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            recent.append(self._step(optimizer, feed.names, inputs, labels))
            if len(recent) == _CHECK_EVERY or step + 1 == steps:
                losses += _checked(torch.stack(recent).tolist(), len(losses), rate)
                recent.clear()
                if progress is not None:
                    progress(Progress(step + 1, steps, losses[-1]))
        self.module.eval()
        return losses

    def _step(
        self, optimizer: torch.optim.Optimizer, names: Sequence[str], inputs: dict[str, Tensor], labels: Tensor | None
    ) -> Tensor:
        with torch.no_grad(), self._precision():
            targets = self.teacher(inputs)
        if not self.kinds:
            self._choose(targets)
        with self._precision():
            answers = self.module(*(inputs[name] for name in names))
        loss = self._loss(answers, targets, labels)
        self.module.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.weights.gather()
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.weights.masters, self.options.clip_norm)
        optimizer.step()
        self.weights.scatter()
        return loss.detach()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.options.mixed_precision and self.weights.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def _choose(self, targets: Sequence[Tensor]) -> None:
        """Decide, at the first batch, how each output is compared."""
        for name, target in zip(self.outputs, targets, strict=True):
            self.kinds[name] = self.options.losses.get(name) or kind_of(target)
            axis = class_axis(target)
            if self.kinds[name] == "kl" and axis is None:
                raise CpdError(f"output {name!r} has shape {list(target.shape)}, no axis of classes; compare it by mse")
            if axis is not None and is_distribution(target, axis):
                self.distributions.add(name)

    def _loss(self, answers: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        terms: list[Tensor] = []
        labelled: Tensor | None = None
        for name, answer, target in zip(self.outputs, answers, targets, strict=True):
            if answer.shape != target.shape:
                shapes = f"{list(answer.shape)} in the student, {list(target.shape)} in the teacher"
                raise ModelError(f"output {name!r} has shape {shapes}; give a teacher of the same outputs")
            if not answer.is_floating_point():
                continue
            axis = class_axis(target)
            if self.kinds[name] == "mse" or axis is None:
                terms.append(relative_error(answer, target))
                continue
            scores = [self._scores(name, output) for output in (answer, target)]
            terms.append(divergence(scores[0], scores[1], axis, self.options.temperature))
            if labels is not None and labelled is None:
                labelled = label_loss(scores[0], labels, axis)
        if labels is not None and labelled is None:
            raise DataError("no output holds scores of classes that labels could be compared with; set label weight 0")
        loss = torch.stack(terms).mean()
        weight = self.options.label_weight
        return loss if labelled is None else (1 - weight) * loss + weight * labelled

    def _scores(self, name: str, output: Tensor) -> Tensor:
        """Scores of classes; those of a distribution are its logarithms."""
        return output.float().clamp(min=_SMALLEST).log() if name in self.distributions else output


class _Weights:
    """The trained parameters and what the optimiser moves: the same tensors, or float32 copies of 16-bit ones."""

    def __init__(self, module: OnnxModule, options: DistillOptions) -> None:
        named = module.onnx_parameters()
        unknown = sorted(set(options.freeze) - set(module.names))
        if unknown:
            raise CpdError(f"the student has no initializer {unknown[0]!r} to freeze")
        for name in options.freeze:
            if name in named:
                named.pop(name).requires_grad_(False)
        if not named:
            raise CpdError("the student has no trainable float initializers; there is nothing to distill")
        self.parameters = list(named.values())
        self.masters = [nn.Parameter(p.detach().float()) if _is_half(p) else p for p in self.parameters]
        self.device = self.parameters[0].device

    def gather(self) -> None:
        """Give the copies their gradients."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()

    def scatter(self) -> None:
        """Round the copies into the parameters."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _optimizer(parameters: Sequence[nn.Parameter], options: DistillOptions) -> torch.optim.Optimizer:
    """The optimiser; vectors (biases, normalisation) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=options.lr)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step: a straight rise, then half a cosine down to zero.

    >>> [round(schedule(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def _checked(losses: list[float], done: int, rate: float) -> list[float]:
    """The losses, if they are all finite."""
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise CpdError(
                f"the loss became {loss} at step {done + place + 1}; lower the learning rate (it was {rate:.1e}), "
                "or check that the data is finite and prepared as the model expects"
            )
    return losses
