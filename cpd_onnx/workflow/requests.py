"""Requests: the options of each command as a frozen dataclass, which can be pickled, copied by `replace` and compared.

Command line, recipes, manifests and docs/options.md are generated from the options declared here; `workflow.api.run`
carries a request out. A request inherits the options of the passes that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cpd_onnx.budget.allocation import KINDS
from cpd_onnx.data.metrics import METRICS
from cpd_onnx.data.open import FORMS
from cpd_onnx.data.sources import ImageOptions
from cpd_onnx.deploy.float16 import HALVES
from cpd_onnx.deploy.profiles import profile_names
from cpd_onnx.deploy.quantize import CALIBRATIONS, Quantization
from cpd_onnx.deploy.steps import LEVELS
from cpd_onnx.ir.model import PLACES
from cpd_onnx.options import (
    above_zero,
    again,
    commas,
    natural,
    not_negative,
    option,
    pair,
    part,
    positive,
)
from cpd_onnx.passes.allocate import Allocate, AllocateOptions, target
from cpd_onnx.passes.iterate import Iterate, ScoringOptions
from cpd_onnx.passes.sensitivity import SensitivityOptions
from cpd_onnx.passes.verify import Verify
from cpd_onnx.report.figures import SUFFIXES
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import SCORE_FUNCTIONS
from cpd_onnx.training.options import DistillOptions
from cpd_onnx.workflow import defaults

Observer: TypeAlias = Callable[[str, int, int | None], None]
"""Called with the current step, the number of finished steps and the total, which is None if it is unknown."""
Pair: TypeAlias = tuple[str, float]


def ignore(what: str, done: int, total: int | None) -> None:
    """Observer that discards every report of progress."""


# Readers of option values.


def file(text: str) -> Path:
    """Return the path of a file to write; raises ValueError if it has no file name."""
    if not Path(text).name:
        raise ValueError(f"{text!r} is not a file name")
    return Path(text)


def input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Return the name and the sizes of NAME:SIZE,SIZE,…; the sizes must be at least 1."""
    name, _, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not NAME:SIZE,SIZE,…") from error
    if not name or min(shape) < 1:
        raise ValueError(f"{text!r} is not NAME:SIZE,SIZE,… with sizes of at least 1")
    return name, shape


def targets(text: str) -> tuple[Pair, ...]:
    """Return the targets of KIND=FRACTION,FRACTION,… or KIND=FRACTION,KIND=FRACTION,…"""
    kind, sign, fractions = text.partition("=")
    parts = fractions.split(",") if sign else []
    return tuple(target(part if "=" in part else f"{kind}={part}") for part in parts or [text])


# Options shared by several requests.


def _target(kind: str, fraction: float) -> Any:
    text = f"Fraction of the original that may remain; KIND is one of {', '.join(KINDS)} (default: {kind}={fraction:g})"
    return option((kind, fraction), text, read=target, metavar="KIND=FRACTION")


def _data(what: str, **more: Any) -> Any:
    return option(None, f"{what}: {FORMS}", **{"takes": "data"} | more)


_model = partial(option, MISSING, flag=" ", read=Path, takes="file", is_recorded=False)
_written = partial(option, None, read=Path, takes="file", is_output=True, is_recorded=False)
_read = partial(option, None, read=Path, takes="file", is_recorded=False)
_profile = partial(option, None, metavar="NAME|FILE.toml", takes="profile")
_run = partial(option, group="training run")
_output = option(
    MISSING, "File to write", flag="-o/--output", read=file, takes="file", is_output=True, is_recorded=False
)
_folder = option(
    MISSING, "Folder to write the files to", flag="-o/--output", read=Path, metavar="FOLDER", is_recorded=False
)


_IF_MOVED = "if it has moved or is outside the manifest's folder"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of all commands."""

    json: str | None = option(
        None,
        "File to write the result to as JSON ('-' for standard output)",
        metavar="FILE",
        takes="file",
        is_output=True,
        is_recorded=False,
    )
    force: bool = option(False, "Overwrite existing files", is_recorded=False)


@dataclass(frozen=True, kw_only=True)
class OnSamples(Request):
    """Options of commands that read samples."""

    data: str | None = _data("Samples")
    images: ImageOptions = part(ImageOptions, "image")


@dataclass(frozen=True, kw_only=True)
class OfSizes(Request):
    """Options of commands that analyse a model."""

    input_shapes: Mapping[str, Sequence[int]] = option(
        {},
        "Shape of an input whose sizes are symbolic in the file; may be repeated",
        read=input_shape,
        flag="--input-shape",
        metavar="NAME:1,3,224,224",
        is_many=True,
    )


@dataclass(frozen=True, kw_only=True)
class Saving(Request):
    """Options of commands that write a model."""

    output: Path = _output
    weights: str = option(
        PLACES[0],
        "Where to store the weights: as in the original (as-is), inside the file (up to 2 GiB), or in a file beside it",
        choices=PLACES,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluating(OnSamples):
    """Options of commands that measure the quality of models."""

    eval: str | None = _data("Samples on which to measure the metric", metavar="DATA")
    metric: str = option(
        defaults.METRIC, f"Metric that measures the models: {', '.join(METRICS)} or module:function", takes="function"
    )


@dataclass(frozen=True, kw_only=True)
class FromRecipe(Request):
    """Options of commands whose options are recorded in a recipe."""

    recipe: Path | None = _read("Recipe to read options from, such as an earlier OUTPUT.recipe.toml")
    trust: tuple[str, ...] = option(
        (),
        "Function that a recipe or manifest is allowed to run; may be repeated",
        metavar="MODULE:FUNCTION",
        is_many=True,
        is_recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class Tracing(Saving):
    """Options of commands that train."""

    checkpoint: Path | None = _written(
        "File from which --resume continues (default: OUTPUT.checkpoint, deleted when the run ends)",
        group="training run",
    )
    checkpoint_seconds: float = _run(300.0, "Seconds between checkpoints", read=not_negative)
    resume: bool = _run(False, "Continue an interrupted run from its checkpoint", is_recorded=False)
    log: Path | None = _written(
        "CSV file to write the losses to, one per round", metavar="CSV", is_recorded=True, group="training run"
    )
    tensorboard: Path | None = _written(
        "Folder to write the losses to for TensorBoard", metavar="FOLDER", is_recorded=True, group="training run"
    )
    watch: str | None = _data(
        "Samples on which to measure the metric of the student during training", metavar="DATA", group="training run"
    )
    watch_every: int = _run(100, "Steps between measurements of the metric", read=positive, metavar="STEPS")
    patience: int = _run(
        0,
        "Stop after this many measurements without improvement, and take the best weights; 0: never",
        read=natural,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class Choosing(ScoringOptions, OnSamples, OfSizes):
    """Options of commands that choose channels."""

    data: str | None = _data("Samples used to score, repair, train and prove (default: none)")
    score: str | None = option(
        None,
        f"Score that ranks channels: {', '.join(SCORE_FUNCTIONS)} or module:function (default: {defaults.SCORE})",
        takes="function",
    )
    policy: str | None = again(
        AllocateOptions,
        "policy",
        help="Allocation policy: the same ratio of each group (uniform), all channels competing (global), those of "
        f"like groups competing (isomorphic), or the least loss (optimal) (default: {defaults.POLICY})",
    )
    profile: str | None = _profile(
        f"Target hardware: {', '.join(profile_names())} or a file; sets --round-to, and the result is checked "
        "against it"
    )
    repair: bool | None = option(
        None,
        "Fit the remaining weights to the original by least squares (default: with data)",
        read=bool,
    )
    allow_inconclusive: bool = option(
        Verify.allow_inconclusive,
        "Write the model even if the proof is inconclusive: the inputs neither prove nor disprove it",
    )


@dataclass(frozen=True, kw_only=True)
class Compressing(Choosing, DistillOptions, Evaluating, FromRecipe):
    """Options of commands that choose channels, repair and distill."""

    model: Path = _model("The original")
    distill: bool | None = option(
        None, "Train against the original, without labels (default: with data, if torch is installed)", read=bool
    )
    sensitivity: bool | None = option(
        None,
        "Report the output error of pruning each group alone (default: with data, if that takes under a minute)",
        read=bool,
    )


# The requests.


@dataclass(frozen=True, kw_only=True)
class Inspect(OnSamples, OfSizes):
    """Show the groups of coupled channels, and what is frozen and why."""

    model: Path = _model("The model")
    data: str | None = _data("Samples on which to measure the sensitivity", group="sensitivity")
    keep: tuple[str, ...] = again(AllocateOptions, "keep")
    sensitivity: bool = option(False, "Measure the output error at several widths of each group", group="sensitivity")
    score: str = again(SensitivityOptions, "score")
    samples: int = again(SensitivityOptions, "samples")
    ratios: tuple[float, ...] = again(SensitivityOptions, "ratios")
    repair: bool = again(SensitivityOptions, "repair")
    plot: Path | None = _written(
        f"File to draw the result to: {', '.join(SUFFIXES)}", metavar="FILE", group="sensitivity"
    )


@dataclass(frozen=True, kw_only=True)
class Prune(Choosing, Saving):
    """Remove channels, prove the result correct, and write it with its plan."""

    model: Path = _model("The original")
    target: Pair = _target(*Allocate.usual_target)
    rounds: int = again(Iterate, "rounds")
    plan: Path | None = _written("File to write the plan to (default: OUTPUT.plan.json)")
    no_verify: bool = option(False, "Skip the proof, which runs both models and compares their outputs")


@dataclass(frozen=True, kw_only=True)
class VerifyFile(OnSamples):
    """Check a pruned, trained or deployed file against its original."""

    original: Path = _model("The original")
    data: str | None = _data("Samples to compare on (default: random)")
    pruned: Path = _model("The file to check; a deployed file is traced back through its manifests")
    plan: Path | None = _read("Plan of the pruned file (default: PRUNED.plan.json)")
    manifest: Path | None = _read(
        "Manifest of the deploy run that wrote the file (default: PRUNED.manifest.json, or another in its folder)"
    )
    via: tuple[Path, ...] = option(
        (),
        "Input of a deploy run that is not in the manifest's folder; may be repeated",
        read=Path,
        metavar="FILE",
        takes="file",
        is_many=True,
    )


@dataclass(frozen=True, kw_only=True)
class Apply(Saving):
    """Replay a plan on its original, bit for bit."""

    model: Path = _model("The original")
    plan: Path = _model("The plan")


@dataclass(frozen=True, kw_only=True)
class Distill(DistillOptions, Evaluating, Tracing, FromRecipe):
    """Fine-tune a pruned model against its original, without labels."""

    teacher: Path = _model("The original")
    data: str | None = _data("Samples to train with")
    student: Path = _model("The pruned model")
    plan: Path | None = _read("Plan that pruned the student (default: STUDENT.plan.json)")


@dataclass(frozen=True, kw_only=True)
class Compress(Compressing, Tracing):
    """Prune, repair, distill, prove and measure in one run; write a report, a recipe and a manifest."""

    target: Pair = _target(*defaults.TARGET)
    rounds: int = again(Iterate, "rounds")
    like: Path | None = _read(
        "Plan whose channels to remove, instead of choosing channels", metavar="PLAN", is_recorded=True
    )
    plan: Path | None = _written("File to write the plan to (default: OUTPUT.plan.json)")
    report: bool = option(True, "Measure latency, and write OUTPUT.report.html, .md and .json")


@dataclass(frozen=True, kw_only=True)
class Sweep(Compressing):
    """Compress to several targets with the same scores, time the models side by side, and pick one."""

    output: Path = _folder
    weights: str = again(Saving, "weights")
    targets: tuple[Pair, ...] = option(
        MISSING,
        "Targets of the models, for example latency=0.7,0.5,0.3",
        flag="--targets",
        read=targets,
        metavar="KIND=FRACTION,…",
    )
    most_lost: float | None = option(
        None,
        "Largest loss of the metric against the original; picks the fastest model within it",
        read=not_negative,
        metavar="NUMBER",
    )
    jobs: int | None = option(
        None, "Number of models compressed in parallel (default: the number of cores)", read=positive
    )
    executor: str | None = option(
        None,
        "Function that returns a concurrent.futures.Executor to run on, whose workers share these folders",
        metavar="MODULE:FUNCTION",
        takes="function",
    )


@dataclass(frozen=True, kw_only=True)
class Reproduce(Request):
    """Repeat the run that a manifest records, and compare the files byte for byte."""

    manifest: Path = _model("The manifest")
    output: Path = _folder
    model: Path | None = _read(f"The original, {_IF_MOVED}")
    data: Path | None = _read(f"The data, {_IF_MOVED}")
    watch: Path | None = _read(f"The data of --watch, {_IF_MOVED}")
    cost_table: Path | None = _read(f"The cost table, {_IF_MOVED}")
    plan: Path | None = _read(f"The plan of --like, {_IF_MOVED}")
    profile: Path | None = _read(f"The profile of the target, {_IF_MOVED}", metavar="FILE.toml")
    trust: tuple[str, ...] = again(FromRecipe, "trust")


@dataclass(frozen=True, kw_only=True)
class Deploy(Evaluating, Saving):
    """Convert a model for its target: sizes, opset, int8, half precision, .ort; compare the outputs of each step."""

    model: Path = _model("The model")
    profile: str | None = _profile(
        f"Target hardware: {', '.join(profile_names())} or a file; sets batch, opset, IR version and quantisation, and "
        "the result is checked against it"
    )
    fix: Mapping[str, Sequence[int]] = option(
        {},
        "Shape of an input, or size of a symbolic dimension; may be repeated",
        read=pair("NAME=SIZE,SIZE,…", commas(positive)),
        metavar="NAME=SIZE,SIZE",
        is_many=True,
    )
    batch: int | None = option(None, "Fixed batch size of all inputs", read=positive, metavar="N")
    opset: int | None = option(None, "ONNX opset version to convert to", read=positive, metavar="N")
    ort: Path | None = _written(
        "File to write the model to in onnxruntime's .ort format as well", metavar="FILE", is_recorded=True
    )
    ort_level: str = option(
        "extended",
        "Graph optimisation level of the .ort file; 'all' fits only processors like this one",
        choices=LEVELS,
    )
    int8: bool = option(False, "Quantise weights and activations to int8, which needs --data", group="int8")
    data: str | None = _data(
        "Samples for calibration and comparison (default: random inputs, for comparison only)", group="int8"
    )
    samples: int | None = option(
        None,
        f"Number of samples used for calibration (default: {Quantization.samples})",
        read=positive,
        metavar="N",
        group="int8",
    )
    calibration: str | None = option(
        None,
        f"Method that determines the range of an activation (default: {Quantization.calibration})",
        choices=CALIBRATIONS,
        group="int8",
    )
    per_tensor: bool = option(False, "Use one scale per weight tensor instead of one per channel", group="int8")
    exclude: tuple[str, ...] = option(
        (),
        "Nodes, weights, tensors or operators that are not quantised (* and ? allowed); may be repeated",
        metavar="PATTERN",
        is_many=True,
        group="int8",
    )
    seed: int = option(Quantization.seed, "Seed of the random choice of samples", read=natural, group="int8")
    half: str | None = option(
        None,
        "Half-precision type to convert to; bfloat16 is for storage only, as onnxruntime cannot compute with it",
        choices=HALVES,
        group="half precision",
    )
    storage_only: bool = option(
        False, "Store the weights in half precision, but compute in float32", group="half precision"
    )


@dataclass(frozen=True, kw_only=True)
class Bench(OnSamples, OfSizes):
    """Measure the latency and memory of models in onnxruntime, side by side."""

    models: tuple[Path, ...] = _model(
        "The models; the first is the baseline of the others", metavar="MODEL", is_many=True
    )
    batch: tuple[int | None, ...] = option(
        (None,), "Batch sizes to measure (default: the model's)", read=commas(positive), metavar="N,N"
    )
    threads: tuple[int, ...] = option(
        (1,), "Numbers of intra-op threads to measure", read=commas(positive), metavar="N,N"
    )
    provider: tuple[str, ...] = option(
        (), f"Execution provider of onnxruntime; may be repeated (default: {Setting.provider})", is_many=True
    )
    seconds: float = option(4.0, "Seconds to measure each setting for", read=above_zero)
    data: str | None = _data("Samples to use as inputs (default: random)")
    plot: Path | None = _written(f"File to draw the result to: {', '.join(SUFFIXES)}", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class Latency(OfSizes):
    """Measure the latency of a model's layers, and write it as a cost table for --cost-table."""

    model: Path = _model("The model")
    output: Path = _output
    seed: int = option(0, "Seed of the random choice of widths to measure", read=natural)
    latency_threads: int = again(AllocateOptions, "latency_threads")
    latency_batch: int | None = again(AllocateOptions, "latency_batch")
    latency_provider: str = again(AllocateOptions, "latency_provider")


@dataclass(frozen=True, kw_only=True)
class Demo(Request):
    """Comb, prune, repair, distill and verify the embedded example."""

    out: Path | None = option(
        None, "Folder to write the files to (default: a new temporary folder)", read=Path, metavar="FOLDER"
    )
    target: Pair = _target(*defaults.DEMO_TARGET)
    epochs: int = again(DistillOptions, "epochs", default=20)
    seed: int = option(0, "Seed of the random choice and of training", read=natural)


@dataclass(frozen=True, kw_only=True)
class Operators(Request):
    """List the operators through which channels can be pruned."""

    missing: bool = option(False, "List the standard operators without a rule instead")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print the completion script of a shell."""

    shell: str = option(MISSING, "The shell to complete in", flag=" ", choices=("bash", "zsh", "tcsh"))


COMMANDS: dict[str, type] = {
    "inspect": Inspect, "prune": Prune, "verify": VerifyFile, "apply": Apply, "distill": Distill, "compress": Compress,
    "sweep": Sweep, "reproduce": Reproduce, "deploy": Deploy, "bench": Bench, "latency": Latency, "demo": Demo,
    "operators": Operators, "completion": Completion,
}  # fmt: skip  # a table
