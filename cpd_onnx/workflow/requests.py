"""Requests: what each command is asked, as a frozen dataclass that can be pickled, changed by `replace` and compared.

The command line, recipes, manifests and docs/options.md know what these have as options; `workflow.run` carries them
out. The options of a pass are inherited from the pass.
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
from cpd_onnx.scores.registry import SCORERS
from cpd_onnx.training.options import DistillOptions
from cpd_onnx.workflow import defaults

Observer: TypeAlias = Callable[[str, int, int | None], None]
"""Told what is being done, and how many steps of how many are done; None where that is not known."""
Pair: TypeAlias = tuple[str, float]


def ignore(what: str, done: int, total: int | None) -> None:
    """The observer where nobody looks."""


# Readers of what has no type of its own.


def file(text: str) -> Path:
    """The path of a file to write, which must have a name."""
    if not Path(text).name:
        raise ValueError(f"{text!r} is not the name of a file")
    return Path(text)


def input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME:SIZE,SIZE,… with sizes above zero."""
    name, _, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not NAME:SIZE,SIZE,…") from error
    if not name or min(shape) < 1:
        raise ValueError(f"{text!r} is not NAME:SIZE,SIZE,… with sizes above 0")
    return name, shape


def targets(text: str) -> tuple[Pair, ...]:
    """One kind for all, or each with its own."""
    kind, sign, fractions = text.partition("=")
    parts = fractions.split(",") if sign else []
    return tuple(target(part if "=" in part else f"{kind}={part}") for part in parts or [text])


# Options that several requests have.


def _target(kind: str, fraction: float) -> Any:
    words = f"KIND=FRACTION, what may remain of {', '.join(KINDS)} (default: {kind}={fraction:g})"
    return option((kind, fraction), words, read=target, metavar="KIND=FRACTION")


def _data(what: str, **more: Any) -> Any:
    return option(None, f"{what}: {FORMS}", **{"takes": "data"} | more)


_model = partial(option, MISSING, flag=" ", read=Path, takes="file", is_recorded=False)
_written = partial(option, None, read=Path, takes="file", is_output=True, is_recorded=False)
_read = partial(option, None, read=Path, takes="file", is_recorded=False)
_profile = partial(option, None, metavar="NAME|FILE.toml", takes="profile")
_run = partial(option, group="the run")
_output = option(
    MISSING, "Where the result goes", flag="-o/--output", read=file, takes="file", is_output=True, is_recorded=False
)
_folder = option(
    MISSING, "Folder that the files go to", flag="-o/--output", read=Path, metavar="FOLDER", is_recorded=False
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all commands have."""

    json: str | None = option(
        None,
        "Write the result as JSON ('-': to standard output)",
        metavar="FILE",
        takes="file",
        is_output=True,
        is_recorded=False,
    )
    force: bool = option(False, "Overwrite files that exist", is_recorded=False)


@dataclass(frozen=True, kw_only=True)
class OnSamples(Request):
    """What commands have that may look at samples."""

    data: str | None = _data("Samples")
    images: ImageOptions = part(ImageOptions, "image")


@dataclass(frozen=True, kw_only=True)
class OfSizes(Request):
    """What commands have that analyse a model."""

    input_shapes: Mapping[str, Sequence[int]] = option(
        {},
        "Sizes of an input that the file leaves open; may be repeated",
        read=input_shape,
        flag="--input-shape",
        metavar="NAME:1,3,224,224",
        is_many=True,
    )


@dataclass(frozen=True, kw_only=True)
class Saving(Request):
    """What commands have that write a model."""

    output: Path = _output
    weights: str = option(
        PLACES[0],
        "Where the weights go: as the original has them, inside the file (below 2 GiB), or beside it",
        choices=PLACES,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluating(OnSamples):
    """What commands have that measure how good models are."""

    eval: str | None = _data("Measure the models on these samples", metavar="DATA")
    metric: str = option(
        defaults.METRIC, f"Metric of the models: {', '.join(METRICS)} or module:function", takes="function"
    )


@dataclass(frozen=True, kw_only=True)
class FromRecipe(Request):
    """What commands have whose options are put on record."""

    recipe: Path | None = _read("Take options from this file, as it is written to OUTPUT.recipe.toml")
    trust: tuple[str, ...] = option(
        (),
        "Function that runs if a recipe or manifest names it; may be repeated",
        metavar="MODULE:FUNCTION",
        is_many=True,
        is_recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class Tracing(Saving):
    """What commands have that train for a while."""

    checkpoint: Path | None = _written(
        "File that an unfinished run goes on from (default: OUTPUT.checkpoint, removed at the end)", group="the run"
    )
    checkpoint_seconds: float = _run(300.0, "Seconds between two checkpoints", read=not_negative)
    resume: bool = _run(False, "Go on from the checkpoint", is_recorded=False)
    log: Path | None = _written(
        "Table of the losses, one for each round", metavar="CSV", is_recorded=True, group="the run"
    )
    tensorboard: Path | None = _written(
        "Folder of the same for TensorBoard", metavar="FOLDER", is_recorded=True, group="the run"
    )
    watch: str | None = _data("Score the student on these samples while it trains", metavar="DATA", group="the run")
    watch_every: int = _run(100, "Steps between two scores", read=positive, metavar="STEPS")
    patience: int = _run(
        0, "Stop after this many scores without a new best, and take that; 0: never", read=natural, metavar="N"
    )


@dataclass(frozen=True, kw_only=True)
class Choosing(ScoringOptions, OnSamples, OfSizes):
    """What commands have that choose channels."""

    score: str | None = option(
        None,
        f"Score that ranks channels: {', '.join(SCORERS)} or module:function (default: {defaults.SCORE})",
        takes="function",
    )
    spread: str | None = again(
        AllocateOptions,
        "spread",
        help="Allocation policy: the same share of each group (uniform), all channels competing (global), those of "
        f"like groups competing (isomorphic), or the least damage (optimal) (default: {defaults.SPREAD})",
    )
    profile: str | None = _profile(
        f"Target that the model is for, {', '.join(profile_names())} or a file: sets "
        "--multiple; the result is checked against it"
    )
    repair: bool | None = option(
        None,
        "Fit what is left to the original by least squares (default: where there is data)",
        read=bool,
    )
    allow_inconclusive: bool = option(
        Verify.allow_inconclusive,
        "Write the model even if the inputs that were tried show too little to prove it right or wrong",
    )


@dataclass(frozen=True, kw_only=True)
class Compressing(Choosing, DistillOptions, Evaluating, FromRecipe):
    """What commands have that choose channels, repair and distill."""

    model: Path = _model("The original")
    distill: bool | None = option(
        None, "Train against the original (default: where there is data, and torch)", read=bool
    )
    sensitivity: bool | None = option(
        None,
        "Show in the report what the outputs lose with each group (default: with data, if it takes a minute)",
        read=bool,
    )


# The requests.


@dataclass(frozen=True, kw_only=True)
class Inspect(OnSamples, OfSizes):
    """Show the coupled channels, and what is kept and why."""

    model: Path = _model("The model")
    keep: tuple[str, ...] = again(AllocateOptions, "keep")
    sensitivity: bool = option(
        False, "Measure the error of the outputs at some widths of each group", group="sensitivity"
    )
    score: str = again(SensitivityOptions, "score")
    samples: int = again(SensitivityOptions, "samples")
    shares: tuple[float, ...] = again(SensitivityOptions, "shares")
    repair: bool = again(SensitivityOptions, "repair")
    plot: Path | None = _written(f"Draw the result: {', '.join(SUFFIXES)}", metavar="FILE", group="sensitivity")


@dataclass(frozen=True, kw_only=True)
class Prune(Choosing, Saving):
    """Remove channels, prove the result, and write it with its plan."""

    model: Path = _model("The original")
    target: Pair = _target(*Allocate.usual_target)
    rounds: int = again(Iterate, "rounds")
    plan: Path | None = _written("Where the plan goes (default: OUTPUT.plan.json)")
    no_verify: bool = option(False, "Do not run the models to compare them")


@dataclass(frozen=True, kw_only=True)
class VerifyFile(OnSamples):
    """Check a pruned, trained or deployed file against its original."""

    original: Path = _model("The original")
    pruned: Path = _model("The file to check; what deploy wrote is followed back")
    plan: Path | None = _read("Plan of the pruned file (default: PRUNED.plan.json)")
    manifest: Path | None = _read(
        "Manifest of the deploy that made the file (default: PRUNED.manifest.json, or one beside)"
    )
    via: tuple[Path, ...] = option(
        (),
        "File that a deployed one was made of, where it is not beside the manifest; may be repeated",
        read=Path,
        metavar="FILE",
        takes="file",
        is_many=True,
    )


@dataclass(frozen=True, kw_only=True)
class Apply(Saving):
    """Replay a plan, bit for bit."""

    model: Path = _model("The original")
    plan: Path = _model("The plan")


@dataclass(frozen=True, kw_only=True)
class Distill(DistillOptions, Evaluating, Tracing, FromRecipe):
    """Fine-tune a pruned model against its original, without labels."""

    teacher: Path = _model("The original")
    student: Path = _model("The pruned model")
    plan: Path | None = _read("Plan that says which channels are shared (default: STUDENT.plan.json)")


@dataclass(frozen=True, kw_only=True)
class Compress(Compressing, Tracing):
    """All in one go: prune, repair, distill, prove, measure; with a report, a recipe and a manifest."""

    target: Pair = _target(*defaults.TARGET)
    rounds: int = again(Iterate, "rounds")
    like: Path | None = _read("Remove what this plan removes, choose nothing", metavar="PLAN", is_recorded=True)
    plan: Path | None = _written("Where the plan goes (default: OUTPUT.plan.json)")
    report: bool = option(True, "Measure, and write OUTPUT.report.html, .md and .json")


@dataclass(frozen=True, kw_only=True)
class Sweep(Compressing):
    """Compress to several targets by the same scores, time all of them in turns, pick one."""

    output: Path = _folder
    weights: str = again(Saving, "weights")
    targets: tuple[Pair, ...] = option(
        MISSING,
        "Targets of the models, as in latency=0.7,0.5,0.3",
        flag="--targets",
        read=targets,
        metavar="KIND=FRACTION,…",
    )
    most_lost: float | None = option(
        None, "Pick the fastest model that loses no more of the metric", read=not_negative, metavar="NUMBER"
    )
    jobs: int | None = option(None, "Models that are made at a time (default: one a core)", read=positive)
    executor: str | None = option(
        None,
        "Gives a concurrent.futures.Executor that makes the models elsewhere, with the same folders",
        metavar="MODULE:FUNCTION",
        takes="function",
    )


@dataclass(frozen=True, kw_only=True)
class Reproduce(Request):
    """Repeat the run of a manifest, and compare every byte."""

    manifest: Path = _model("The manifest")
    output: Path = _folder
    model: Path | None = _read("The original, if it has moved or lies outside the manifest's folder")
    data: Path | None = _read("The data, likewise")
    watch: Path | None = _read("The data to watch, likewise")
    cost_table: Path | None = _read("The cost table, likewise")
    plan: Path | None = _read("The plan that was carried out, likewise")
    profile: Path | None = _read("The profile of the target, likewise", metavar="FILE.toml")
    trust: tuple[str, ...] = again(FromRecipe, "trust")


@dataclass(frozen=True, kw_only=True)
class Deploy(Evaluating, Saving):
    """Make a model ready for its target: sizes, opset, int8 or half floats, .ort; each step compared."""

    model: Path = _model("The model")
    profile: str | None = _profile(
        f"Target that the model is for, {', '.join(profile_names())} or a file: its batch, opset "
        "and IR version, and how it quantises; the result is checked against it"
    )
    fix: Mapping[str, Sequence[int]] = option(
        {},
        "Shape of an input, or size of a symbolic axis; may be repeated",
        read=pair("NAME=SIZE,SIZE,…", commas(positive)),
        metavar="NAME=SIZE,SIZE",
        is_many=True,
    )
    batch: int | None = option(None, "Samples at a time, for good", read=positive, metavar="N")
    opset: int | None = option(None, "Operator set to convert to", read=positive, metavar="N")
    ort: Path | None = _written("Write it in onnxruntime's own format too", metavar="FILE", is_recorded=True)
    ort_level: str = option(
        "extended",
        "How far onnxruntime optimises that; all: for processors like this one only",
        choices=LEVELS,
    )
    int8: bool = option(False, "Quantise weights and activations to int8; needs --data", group="int8")
    data: str | None = _data("Samples to calibrate and compare on (default: random, to compare only)", group="int8")
    samples: int | None = option(
        None,
        f"Number of samples used to calibrate (default: {Quantization.samples})",
        read=positive,
        metavar="N",
        group="int8",
    )
    calibration: str | None = option(
        None,
        f"How the range of an activation is found (default: {Quantization.calibration})",
        choices=CALIBRATIONS,
        group="int8",
    )
    per_tensor: bool = option(False, "One scale for each weight, not for each channel", group="int8")
    exclude: tuple[str, ...] = option(
        (),
        "Nodes, weights, tensors or operators that stay float (* and ? allowed); may be repeated",
        metavar="PATTERN",
        is_many=True,
        group="int8",
    )
    seed: int = option(Quantization.seed, "Seed of the choice of samples", read=natural, group="int8")
    half: str | None = option(
        None,
        "Half floats; bfloat16 is stored only, as onnxruntime cannot compute with it",
        choices=HALVES,
        group="half floats",
    )
    storage_only: bool = option(False, "Store float16, compute in float32", group="half floats")


@dataclass(frozen=True, kw_only=True)
class Bench(OnSamples, OfSizes):
    """Measure how long onnxruntime takes for models, side by side."""

    models: tuple[Path, ...] = _model(
        "The models; the first is what the others count against", metavar="MODEL", is_many=True
    )
    batch: tuple[int | None, ...] = option(
        (None,), "Samples at a time (default: the model's)", read=commas(positive), metavar="N,N"
    )
    threads: tuple[int, ...] = option((1,), "Threads for one operator", read=commas(positive), metavar="N,N")
    provider: tuple[str, ...] = option(
        (), f"Execution provider of onnxruntime; may be repeated (default: {Setting.provider})", is_many=True
    )
    seconds: float = option(4.0, "Seconds for each setting", read=above_zero)
    data: str | None = _data("Inputs (default: random)")
    plot: Path | None = _written(f"Draw the result: {', '.join(SUFFIXES)}", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class Latency(OfSizes):
    """Measure where a model's time goes, as a cost table for 'prune'."""

    model: Path = _model("The model")
    output: Path = _output
    seed: int = option(0, "Seed of the widths that are measured", read=natural)
    latency_threads: int = again(AllocateOptions, "latency_threads")
    latency_batch: int | None = again(AllocateOptions, "latency_batch")
    latency_provider: str = again(AllocateOptions, "latency_provider")


@dataclass(frozen=True, kw_only=True)
class Demo(Request):
    """Comb, prune, distill and verify the embedded example."""

    out: Path | None = option(
        None, "Folder for the files that it makes (default: none are kept)", read=Path, metavar="FOLDER"
    )
    target: Pair = _target(*defaults.DEMO_TARGET)
    epochs: int = again(DistillOptions, "epochs", default=20)
    seed: int = option(0, "Seed of the random choice and of training", read=natural)


@dataclass(frozen=True, kw_only=True)
class Operators(Request):
    """List the operators that channels are followed through."""

    missing: bool = option(False, "List the standard operators that they are not")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print what a shell reads to complete commands and options."""

    shell: str = option(MISSING, "The shell", flag=" ", choices=("bash", "zsh", "tcsh"))


COMMANDS: dict[str, type] = {
    "inspect": Inspect, "prune": Prune, "verify": VerifyFile, "apply": Apply, "distill": Distill, "compress": Compress,
    "sweep": Sweep, "reproduce": Reproduce, "deploy": Deploy, "bench": Bench, "latency": Latency, "demo": Demo,
    "operators": Operators, "completion": Completion,
}  # fmt: skip  # a table
