"""The training loop: steps, learning rate schedule, checkpoints, logs, and diagnosis of non-finite values."""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from cpd_onnx.errors import CpdError, StoppedError
from cpd_onnx.io.files import write_atomically
from cpd_onnx.io.progress import advance
from cpd_onnx.torch.module import OnnxModule
from cpd_onnx.training.feed import Feed
from cpd_onnx.training.losses import DistillationLoss
from cpd_onnx.training.options import LOSSES, RATE, Optimization
from cpd_onnx.training.process_group import ProcessGroup

Array = npt.NDArray[Any]
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_CHECKPOINT = "cpd-onnx/checkpoint 2"
"""Format name and version of a checkpoint file."""
_TOGETHER = 1 << 21
"""Numbers in the inputs of a part of a batch, whose activations are in memory together: 13 images of 224 by 224
(heuristic)."""
_CHECK_EVERY = 20
"""Updates on a GPU between two checks of the losses, each of which synchronizes with the device (heuristic)."""


@dataclass(frozen=True)
class Progress:
    """Progress of the training: updates done, total number of updates, and the loss of the last one."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class HeldOut:
    """Evaluation of the student on held-out data during training.

    Attributes:
        judge: Function from the module's tensors by their ONNX names to a score.
        every: Number of updates between two evaluations.
        patience: Number of evaluations without a new best score after which training stops; the best weights are the
            result. 0 trains to the end and takes the last weights.
        lower_is_better: Whether lower scores are better.
    """

    judge: Callable[[Mapping[str, Array]], float]
    every: int
    patience: int = 0
    lower_is_better: bool = False


@dataclass(frozen=True)
class Traces:
    """Checkpoints and logs that a run writes.

    Attributes:
        checkpoint: Checkpoint file, written every `seconds`, on interruption, and at the end.
        seconds: Seconds between two checkpoints.
        resume: Whether to continue from the checkpoint.
        csv: File for a table of step, learning rate and loss.
        tensorboard: Folder for the logs of TensorBoard.
    """

    checkpoint: Path | None = None
    seconds: float = 300.0
    resume: bool = False
    csv: Path | None = None
    tensorboard: Path | None = None


@dataclass
class _Best:
    """The best score so far, the number of evaluations since, and the weights that reached it."""

    value: float = -math.inf
    misses: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)


class Trainer:
    """One training run of a student against its teacher."""

    def __init__(  # noqa: PLR0913  # the arguments after the process group are keywords
        self,
        module: OnnxModule,
        teacher: Run,
        objective: DistillationLoss,
        schedule: Optimization,
        process_group: ProcessGroup,
        *,
        freeze: Sequence[str] = (),
        in_parts: bool = False,
    ) -> None:
        """Create the run of a module on the device of the process group; initializers in `freeze` are not trained.

        With `in_parts`, the gradient of a batch of large samples is the sum of those of its parts.

        Raises:
            CpdError: There is nothing to train.
        """
        self.module, self.teacher, self.objective = module, teacher, objective
        self.schedule, self.process_group, self.in_parts = schedule, process_group, in_parts
        self.rate = RATE if schedule.lr is None else schedule.lr
        self.weights = _Weights(module, freeze)
        self.optimizer = _optimizer(self.weights.masters, schedule, self.rate)
        self.average = [m.detach().clone() for m in self.weights.masters] if schedule.ema else []
        self.forward = process_group.parallel(module)
        self.losses: list[float] = []
        self.judged: list[tuple[int, float]] = []
        self.best = _Best()
        self.start = 0

    def train(
        self,
        feed: Feed,
        steps: int,
        *,
        traces: Traces | None = None,
        identity: str = "",
        held_out: HeldOut | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[float]:
        """Train up to a number of steps and return the losses of all of them, including those before a checkpoint.

        Raises:
            CpdError: The loss or a gradient became infinite or NaN, or the checkpoint belongs to another run.
            StoppedError: The process was interrupted; a checkpoint was written.
        """
        traces = traces or Traces()
        if traces.resume:
            self._resume(traces.checkpoint, identity)
        recent: list[Tensor] = []
        each = 1 if self.process_group.device.type == "cpu" else _CHECK_EVERY
        written = time.monotonic()
        self.module.train()
        advance(self.start, steps)
        with _stop_signals(traces.checkpoint is not None) as stop, _log(traces, self) as log:
            for step, (inputs, labels) in zip(range(self.start, steps), feed.batches(self.start), strict=False):
                rate = self.rate * cosine(step, steps, self.schedule.warmup)
                recent.append(self._step(step, inputs, labels, rate))
                done = step + 1
                stopping = self.process_group.any(stop.is_set())
                if len(recent) == each or done == steps or stopping:
                    fresh = self._checked(recent, inputs, rate)
                    log(len(self.losses), fresh, rate)
                    self.losses += fresh
                    recent.clear()
                    advance(done, steps, f"loss {self.losses[-1]:.4f}")
                    if progress is not None:
                        progress(Progress(done, steps, self.losses[-1]))
                if held_out is not None and (done % held_out.every == 0 or done == steps):
                    self.judged.append((done, value := self._judge(held_out)))
                    log.judged(done, value)
                    if held_out.patience and self._is_exhausted(value, held_out):
                        break
                is_due = traces.checkpoint and self.process_group.any(time.monotonic() - written > traces.seconds)
                if traces.checkpoint is not None and not recent and (stopping or is_due):
                    self._write(traces.checkpoint, done, identity)
                    written = time.monotonic()
                if stopping and done < steps:
                    raise StoppedError(
                        f"interrupted after step {done} of {steps}; checkpoint written to {traces.checkpoint}; "
                        "continue with --resume"
                    )
        if traces.checkpoint is not None and self.start < steps:
            self._write(traces.checkpoint, steps, identity)
        self._finish()
        return self.losses

    def _step(self, step: int, inputs: list[Tensor], labels: Tensor | None, rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.zero_grad(set_to_none=True)
        losses = [self._gradient(share, part, labels) for share, part in self._parts(inputs)]
        value = torch.stack(losses).sum()
        self.weights.gather()
        if self.process_group.device.type == "cpu" and not bool(value.isfinite()):
            return value  # unchanged weights, with which `culprit` finds the cause
        if self.schedule.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.weights.masters, self.schedule.clip_norm)
            if self.process_group.device.type == "cpu" and not bool(norm.isfinite()):
                raise CpdError(
                    f"at step {step + 1} {self._bad_gradient()}; lower the learning rate (it was {rate:.1e})"
                )
        self.optimizer.step()
        self.weights.scatter()
        if self.average:
            decay = min(self.schedule.ema, (1 + step) / (10 + step))
            masters = [m.detach() for m in self.weights.masters]
            torch._foreach_lerp_(self.average, masters, 1 - decay)
        return value

    def _parts(self, inputs: list[Tensor]) -> Iterator[tuple[float, list[Tensor]]]:
        """Yield the parts of a batch that are computed one after the other: their share of it, and their inputs.

        A batch is one part where the loss compares its samples, or averages over those with a label. Relative errors
        are relative to the teacher's values in their part.
        """
        adds_up = not self.objective.label_weight and "dist" not in self.objective.wanted.values()
        count = len(inputs[0]) if inputs[0].ndim else 0
        if not self.in_parts or not adds_up or any(x.ndim == 0 or len(x) != count for x in inputs):
            yield 1.0, inputs
            return
        size = max(1, _TOGETHER * count // max(1, sum(x.numel() for x in inputs)))
        for start in range(0, count, size):
            part = [x[start : start + size] for x in inputs]
            yield len(part[0]) / count, part

    def _gradient(self, share: float, inputs: list[Tensor], labels: Tensor | None) -> Tensor:
        """Add the gradient of a part of a batch, and return what it adds to the loss."""
        with torch.no_grad(), self._precision():
            targets = self.teacher(inputs)
        if not self.objective.kinds:
            self.objective.choose(targets)
            shared = self.process_group.shared((self.objective.kinds, sorted(self.objective.distributions)))
            self.objective.kinds, self.objective.distributions = shared[0], set(shared[1])
        with self._precision():
            answers = self.forward(*inputs)
        loss = share * self.objective.loss(answers, targets, labels if self.objective.label_weight else None)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return loss.detach()

    def _bad_gradient(self) -> str:
        named = self.module.onnx_parameters().items()
        bad = [name for name, p in named if p.grad is not None and not _is_finite(p.grad)]
        return f"the gradient of initializer {bad[0]!r} is not finite" if bad else "the gradient is too large"

    def _precision(self) -> AbstractContextManager[Any]:
        if self.schedule.mixed_precision:
            return torch.autocast(self.process_group.device.type, torch.bfloat16)
        return nullcontext()

    def _checked(self, recent: Sequence[Tensor], inputs: Sequence[Tensor], rate: float) -> list[float]:
        """Return the losses as numbers; raises CpdError if one is not finite."""
        values: list[float] = self.process_group.mean(torch.stack(list(recent))).tolist()
        for place, loss in enumerate(values):
            if not math.isfinite(loss):
                raise CpdError(
                    f"the loss became {loss} at step {len(self.losses) + place + 1}, {culprit(self.module, inputs)}; "
                    f"lower the learning rate (it was {rate:.1e}), or check that the data is finite and prepared as "
                    "the model expects"
                )
        return values

    def _judge(self, held_out: HeldOut) -> float:
        with self._averaged():
            value = held_out.judge(self.module.onnx_state()) if self.process_group.is_first else 0.0
        self.module.train()
        return float(self.process_group.shared(value))

    def _is_exhausted(self, score: float, held_out: HeldOut) -> bool:
        """Record the best weights so far; return whether the patience is exhausted."""
        value = -score if held_out.lower_is_better else score
        if value > self.best.value:
            with self._averaged():
                state = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
            self.best = _Best(value, 0, state)
        else:
            self.best.misses += 1
        return self.best.misses >= held_out.patience

    def _finish(self) -> None:
        """Load the resulting weights into the module."""
        if self.best.state:
            self.module.load_state_dict(self.best.state, strict=False)
        elif self.average:
            self.weights.put(self.average)
        self.module.eval()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Run the block with the averaged weights in the module, if there are any."""
        own = [m.detach().clone() for m in self.weights.masters] if self.average else []
        if own:
            self.weights.put(self.average)
        self.module.eval()
        yield
        if own:
            self.weights.put(own)

    # Checkpoints.

    def _write(self, path: Path, step: int, identity: str) -> None:
        if not self.process_group.is_first:
            return
        content = {
            "format": _CHECKPOINT, "identity": identity, "step": step, "module": self.module.state_dict(),
            "masters": [m.detach() for m in self.weights.masters], "optimizer": self.optimizer.state_dict(),
            "average": self.average, "losses": self.losses, "judged": self.judged, "kinds": dict(self.objective.kinds),
            "distributions": sorted(self.objective.distributions), "random": torch.get_rng_state(),
            "best": {"value": self.best.value, "misses": self.best.misses, "state": self.best.state},
        }  # fmt: skip  # a table
        stream = io.BytesIO()
        torch.save(content, stream)
        write_atomically(path, stream.getvalue())

    def _resume(self, path: Path | None, identity: str) -> None:
        content = read_checkpoint(path)
        if content["identity"] != identity:
            raise CpdError(f"{path} is the checkpoint of another run: the models, the data or the options differ")
        try:
            self._restore(content)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CpdError(f"{path} is damaged ({_first_line(error)}); start without --resume") from error

    def _restore(self, content: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint; errors of Python and torch mean that it is damaged."""
        self.module.load_state_dict(content["module"])
        self.weights.put([tensor.to(self.process_group.device) for tensor in content["masters"]])
        self.optimizer.load_state_dict(content["optimizer"])
        average = [tensor.to(self.process_group.device) for tensor in content["average"]]
        if [tensor.shape for tensor in average] != [tensor.shape for tensor in self.average]:
            raise ValueError("its averages have other shapes")
        self.average = average
        self.losses, self.start = [float(loss) for loss in content["losses"]], content["step"]
        if not isinstance(self.start, int) or self.start != len(self.losses):
            raise ValueError("its losses are not those of its steps")
        self.judged = [(int(step), float(value)) for step, value in content["judged"]]
        kinds = content["kinds"]
        if not isinstance(kinds, dict) or not set(kinds.values()) <= set(LOSSES):
            raise ValueError("its losses are of unknown kinds")
        self.objective.kinds = kinds
        self.objective.distributions = {str(name) for name in content["distributions"]}
        best = content["best"]
        self.best = _Best(float(best["value"]), int(best["misses"]), dict(best["state"]))
        torch.set_rng_state(content["random"])


def read_checkpoint(path: Path | None) -> dict[str, Any]:
    """Return the content of a checkpoint file; raises CpdError if it is not a checkpoint."""
    if path is None or not path.is_file():
        raise CpdError(f"there is no checkpoint {path} to resume from; start without --resume")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a damaged file raises
        raise CpdError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != _CHECKPOINT:
        raise CpdError(f"{path} is not a checkpoint of this version; start without --resume")
    if not isinstance(content.get("identity"), str):
        raise CpdError(f"{path} is damaged (it names no run); start without --resume")
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


# The schedule and the weights.


def cosine(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at a step: a linear warm-up, then half a cosine down to zero.

    >>> [round(cosine(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


class _Weights:
    """The trained parameters and the tensors that the optimizer updates, float32 masters of 16-bit parameters."""

    def __init__(self, module: OnnxModule, freeze: Sequence[str]) -> None:
        named = module.onnx_parameters()
        unknown = sorted(set(freeze) - set(module.names))
        if unknown:
            raise CpdError(f"the student has no initializer {unknown[0]!r} to freeze")
        for name in freeze:
            if name in named:
                named.pop(name).requires_grad_(False)
        if not named:
            raise CpdError("the student has no trainable float initializers; there is nothing to distill")
        self.parameters = list(named.values())
        self.masters = [nn.Parameter(p.detach().float()) if _is_half(p) else p for p in self.parameters]

    def gather(self) -> None:
        """Copy the gradients to the masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()

    def scatter(self) -> None:
        """Round the masters into the parameters."""
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def put(self, values: Sequence[Tensor]) -> None:
        """Overwrite all weights, in their order."""
        with torch.no_grad():
            for master, value in zip(self.masters, values, strict=True):
                master.copy_(value)
        self.scatter()


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _optimizer(parameters: Sequence[nn.Parameter], schedule: Optimization, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer; vectors (biases, normalisation) have no weight decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=rate)


# Diagnosis.


class _Watch(fx.Interpreter):
    """Runs a module node by node and records the first node whose result is not finite."""

    found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and check its result."""
        result = super().run_node(n)
        if self.found is None and n.op not in ("placeholder", "output") and not _is_finite(result):
            self.found = n
        return result


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return all(map(_is_finite, value)) if isinstance(value, (tuple, list)) else True


def culprit(module: OnnxModule, inputs: Sequence[Tensor]) -> str:
    """Return where the first non-finite number occurs: in an input, a weight, the result of a node, or the loss."""
    if not _is_finite(list(inputs)):
        return "first in the data"
    parameters = module.onnx_parameters()
    for name, attribute in module.names.items():
        tensor = getattr(module, attribute)
        # A mask may contain infinities by design.
        bad = not _is_finite(tensor) if name in parameters else bool(tensor.isnan().any())
        if bad:
            return f"first in initializer {name!r}"
    watch = _Watch(module)
    with torch.no_grad():
        watch.run(*inputs)
    if watch.found is not None:
        return f"first in {watch.found.meta.get('onnx', watch.found.name)}"
    return "first in the comparison of the outputs"


# Stopping and logging.


@contextmanager
def _stop_signals(listen: bool) -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """Writes losses and scores to a CSV table and to TensorBoard."""

    def __init__(self, table: Any, board: Any) -> None:
        self.table, self.board = table, board

    def __call__(self, done: int, losses: Sequence[float], rate: float) -> None:
        for step, loss in enumerate(losses, start=done + 1):
            if self.table is not None:
                self.table.writerow([step, "loss", repr(loss), f"{rate:.6g}"])
            if self.board is not None:
                self.board.add_scalar("loss", loss, step)
                self.board.add_scalar("learning rate", rate, step)

    def judged(self, step: int, value: float) -> None:
        """Write the score of the student on held-out data."""
        if self.table is not None:
            self.table.writerow([step, "held out", repr(value), ""])
        if self.board is not None:
            self.board.add_scalar("held out", value, step)


@contextmanager
def _log(traces: Traces, trainer: Trainer) -> Iterator[_Log]:
    """Open the log of this run; on resumption, rows after the checkpoint are dropped."""
    if not trainer.process_group.is_first:
        yield _Log(None, None)
        return
    board = _board(traces.tensorboard, trainer.start)
    if traces.csv is None:
        yield _Log(None, board)
    else:
        earlier = _rows_until(traces.csv, trainer.start) if traces.resume else []
        with traces.csv.open("w", newline="", buffering=1) as stream:
            table = csv.writer(stream)
            table.writerow(["step", "what", "value", "learning_rate"])
            table.writerows(earlier)
            yield _Log(table, board)
    if board is not None:
        board.close()


def _rows_until(path: Path, step: int) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as stream:
        try:
            return [row for row in csv.reader(stream) if row and row[0].isdecimal() and int(row[0]) <= step]
        except (csv.Error, ValueError) as error:
            raise CpdError(f"{path} is not a training log ({error}): name another file") from error


def _board(folder: Path | None, start: int) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise CpdError("logging for TensorBoard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=start or None)
