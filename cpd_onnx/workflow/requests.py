"""Requests: the options of each command as a frozen dataclass, which can be pickled, copied by `replace` and compared.

Command line, recipes, manifests and docs/options.md are generated from the options declared here; `workflow.api.run`
carries a request out. A request inherits the options of the passes that it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from cpd_onnx.budget import targets as budget_targets
from cpd_onnx.budget.targets import ALL_KINDS, AnyTargets, Targets
from cpd_onnx.data.agreement import TASKS
from cpd_onnx.data.detection import DETECTORS
from cpd_onnx.data.metrics import METRICS
from cpd_onnx.data.open import FORMS
from cpd_onnx.data.sources import ImageOptions
from cpd_onnx.deploy.float16 import HALVES
from cpd_onnx.deploy.merged import MEASURES
from cpd_onnx.deploy.precision import PRECISIONS
from cpd_onnx.deploy.profiles import profile_names
from cpd_onnx.deploy.quantize import CALIBRATIONS, Quantization
from cpd_onnx.deploy.quantize import FORMS as INT8_FORMS
from cpd_onnx.deploy.steps import LEVELS
from cpd_onnx.deploy.weight_bits import BITS
from cpd_onnx.io.progress import Notify
from cpd_onnx.io.progress import ignore as ignore
from cpd_onnx.ir.model import PLACES
from cpd_onnx.options import (
    above_zero,
    commas,
    natural,
    not_negative,
    option,
    pair,
    part,
    positive,
    ratio,
    same_option,
)
from cpd_onnx.passes.allocate import AllocateOptions
from cpd_onnx.passes.iterate import Iterate, ScoringOptions
from cpd_onnx.passes.sensitivity import SensitivityOptions
from cpd_onnx.passes.verify import Verify
from cpd_onnx.report.figures import SUFFIXES
from cpd_onnx.runtime import providers
from cpd_onnx.runtime.sessions import Method
from cpd_onnx.scores.registry import SCORE_FUNCTIONS
from cpd_onnx.training.options import DistillOptions
from cpd_onnx.workflow import defaults

Observer: TypeAlias = Notify
"""Called with the current step, the number of its finished parts and the total, which is None if it is unknown."""
SHELLS = ("bash", "zsh", "tcsh", "fish")
"""Shells that `completion` prints a script for."""
QUIET = "quiet"
"""Log level without messages on standard error other than errors."""
LOG_LEVELS = (QUIET, "info", "debug")
"""How much is said on standard error while a command works, from nothing to the durations of its steps."""


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


def loss_bound(text: str) -> float:
    """Return a number of at least 0; "inf" stands for no bound at all, so that no loss is a failure."""
    return math.inf if text == "inf" else not_negative(text)


def targets(text: str) -> tuple[Targets, ...]:
    """Return the targets of KIND=AMOUNT,AMOUNT,… or KIND=AMOUNT,KIND=AMOUNT,…, each for a model of its own."""
    kind, sign, amounts = text.partition("=")
    parts = amounts.split(",") if sign else []
    return tuple(budget_targets.parse(part if "=" in part else f"{kind}={part}") for part in parts or [text])


# Options shared by several requests.


_DATA: dict[str, Any] = {"takes": "data", "suffixes": (".npz",), "is_common": True}


_TARGET = (
    "What may remain: a fraction of the original, or an amount (latency=5ms, flash=400kB, ram=256KiB, macs=30M); "
    f"several are met together; KIND is one of {', '.join(ALL_KINDS)}"
)
_SUGGESTED: dict[str, Any] = {"is_common": True, "suggested": tuple(f"{kind}=0.5" for kind in ALL_KINDS)}
_USUAL_TARGET = f"{'='.join(map(str, defaults.TARGET))}, or more if that loses more than --max-loss"


def _target(kind: str, fraction: float) -> Any:
    text = f"{_TARGET} (default: {kind}={fraction:g})"
    return option(
        budget_targets.fraction(kind, fraction), text, read=budget_targets.parse, metavar="KIND=AMOUNT,…", **_SUGGESTED
    )


_optional_target = option(
    None, f"{_TARGET} (default: {_USUAL_TARGET})", read=budget_targets.parse, metavar="KIND=AMOUNT,…", **_SUGGESTED
)


def _bits(text: str) -> int:
    """Return a number of bits that weights can be stored in."""
    if text not in map(str, BITS):
        raise ValueError(f"{text!r} is not {' or '.join(map(str, BITS))}")
    return int(text)


def _data(what: str, **more: Any) -> Any:
    return option(None, f"{what}: {FORMS}", **_DATA | more)


_model = partial(option, MISSING, flag=" ", read=Path, takes="file", is_recorded=False, suffixes=(".onnx",))
_written = partial(option, None, read=Path, takes="file", is_output=True, is_recorded=False)
_read = partial(option, None, read=Path, takes="file", is_recorded=False)
_profile = partial(
    option, None, metavar="NAME|FILE.toml", takes="profile", is_common=True, suggested=tuple(profile_names())
)
_JSON = (".json",)
_MERGED = _written(
    "File to write the pruned model to once more, prepared with deploy --merge: with linear operators multiplied into "
    "one where that saves time, if the target is a latency that is measured here, and multiply-accumulates otherwise",
    suffixes=(".onnx",),
)
_run = partial(option, group="training run")
_MAX_LOSS = option(
    None,
    "Largest loss of the metric of --eval or, without it, of the answers that are the original's; finds the fastest "
    "model within it, by a search over targets; inf: no loss is a failure (default: 0.05, or 0.1 of the answers; with "
    "--target without a search)",
    read=loss_bound,
    metavar="NUMBER",
    is_common=True,
)
_EXECUTOR = option(
    None,
    "Function that returns a concurrent.futures.Executor to run on, whose workers share these folders",
    metavar="MODULE:FUNCTION",
    takes="function",
)
_output = option(
    MISSING, "File to write", flag="-o/--output", read=file, metavar="FILE", takes="file", is_output=True,
    is_recorded=False, suffixes=(".onnx",),
)  # fmt: skip  # what and how
_folder = option(
    MISSING, "Folder to write the files to", flag="-o/--output", read=Path, metavar="FOLDER", is_recorded=False
)

_step = option(None, "Step of a plan of nested models (default: the smallest)", metavar="NAME")


_IF_MOVED = "if it has moved or is outside the manifest's folder"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of all commands; `examples` are command lines for the help."""

    examples: ClassVar[tuple[str, ...]] = ()
    json: str | None = option(
        None,
        "File to write the result to as JSON ('-' for standard output)",
        metavar="FILE",
        takes="file",
        is_output=True,
        is_recorded=False,
        is_common=True,
        suffixes=(".json",),
    )
    force: bool = option(False, "Overwrite existing files", is_recorded=False, is_common=True)
    custom_ops: tuple[Path, ...] = option(
        (),
        "Library of custom operators that onnxruntime loads and runs; may be repeated",
        read=Path,
        metavar="FILE",
        takes="file",
        is_many=True,
        is_recorded=False,
    )
    log_level: str = option(
        LOG_LEVELS[1],
        "Messages on standard error while it works: only errors (quiet), progress and warnings (info), or also the "
        "duration of each step (debug)",
        choices=LOG_LEVELS,
        is_recorded=False,
        is_common=True,
    )


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
        is_common=True,
    )


@dataclass(frozen=True, kw_only=True)
class OfChannels(OfSizes):
    """Options of commands that find the channels of a model."""

    free_io: tuple[str, ...] = option(
        (),
        "Pattern of names of inputs and outputs that may lose channels, such as 'past*', or 'caches' for those whose "
        "names speak of a cache; may be repeated",
        metavar="PATTERN",
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
        defaults.METRIC, f"Metric that measures the models: {', '.join(METRICS)} or module:function", takes="function",
        is_common=True, suggested=tuple(METRICS),
    )  # fmt: skip  # what and how
    detector: str | None = option(
        None, "Form of the outputs for --metric map (default: the one that their shapes fit)", choices=DETECTORS
    )


@dataclass(frozen=True, kw_only=True)
class FromRecipe(Request):
    """Options of commands whose options are recorded in a recipe."""

    recipe: Path | None = _read(
        "Recipe to read options from, such as an earlier OUTPUT.recipe.toml", suffixes=(".toml",)
    )
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
        "CSV file to write the losses to, one per round",
        metavar="CSV",
        is_recorded=True,
        group="training run",
        suffixes=(".csv",),
    )
    tensorboard: Path | None = _written(
        "Folder to write the losses to for TensorBoard", metavar="FOLDER", is_recorded=True, group="training run"
    )
    watch: str | None = _data(
        "Samples on which to measure the metric of the student during training",
        metavar="DATA",
        group="training run",
        is_common=False,
    )
    watch_every: int = _run(100, "Steps between measurements of the metric", read=positive, metavar="STEPS")
    patience: int = _run(
        0,
        "Stop after this many measurements without improvement, and take the best weights; 0: never",
        read=natural,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class Choosing(ScoringOptions, OnSamples, OfChannels):
    """Options of commands that choose channels."""

    data: str | None = _data("Samples used to score, repair, train and prove (default: none)")
    score: str | None = option(
        None,
        f"Score that ranks channels: {', '.join(SCORE_FUNCTIONS)} or module:function (default: {defaults.SCORE})",
        takes="function",
        suggested=tuple(SCORE_FUNCTIONS),
    )
    policy: str | None = same_option(
        AllocateOptions,
        "policy",
        help="Allocation policy: the same ratio of each group (uniform), all channels competing (global), those of "
        f"like groups competing (isomorphic), or the least loss (optimal) (default: {defaults.POLICY})",
    )
    round_to: int | str | None = same_option(
        AllocateOptions,
        "round_to",
        help="Number of which the remaining widths are multiples; auto: the vector width of this computer's processor, "
        f"in groups of several vectors (default: {defaults.ROUND_TO})",
    )
    effort: int | None = same_option(
        AllocateOptions,
        "effort",
        help="Number of allocations that are repaired and compared with the original at the outputs, on samples that "
        f"nothing is fitted to; the nearest is taken; 0 compares none (default: {defaults.EFFORT})",
    )
    check_speed: bool = same_option(AllocateOptions, "check_speed", default=True)
    nearest: bool = same_option(AllocateOptions, "nearest", default=True)
    profile: str | None = _profile(
        f"Target hardware: {', '.join(profile_names())} or a file; sets --round-to and --deploy-as, and the result is "
        "checked against it"
    )
    repair: bool | None = option(
        None,
        "Fit the remaining weights to the original by least squares (default: with data)",
        read=bool,
    )
    hold_out: float = option(
        defaults.HOLD_OUT,
        "Fraction of the data that nothing is fitted to, and that the result is measured on; not used with --eval; "
        "`prune` holds out more if the fit does not need it",
        read=ratio,
        metavar="FRACTION",
    )
    task: str | None = option(
        None,
        "What the outputs hold, for the agreement with the original (default: told from their values)",
        choices=TASKS,
    )
    blind: bool = option(
        False,
        "Without data, choose channels and fit weights on generated inputs, although the accuracy is then unknown and "
        "probably lost; otherwise only channels are removed that change no output",
        is_common=True,
    )
    keep_anyway: bool = option(False, "Write the model even if it is not faster than the original")
    allow_inconclusive: bool = option(
        Verify.allow_inconclusive,
        "Write the model even if the proof is inconclusive: the inputs neither prove nor disprove it",
    )


@dataclass(frozen=True, kw_only=True)
class Compressing(Choosing, DistillOptions, Evaluating, FromRecipe):
    """Options of commands that choose channels, repair and distill."""

    model: Path = _model("The original")
    distill: bool | None = option(
        None, "Train against the original, without labels (default: with data, if torch is installed)", read=bool,
        is_common=True,
    )  # fmt: skip  # what and how
    sensitivity: bool | None = option(
        None,
        "Report the output error of pruning each group alone (default: with data, if that takes under a minute)",
        read=bool,
    )


# The requests.


@dataclass(frozen=True, kw_only=True)
class Inspect(OnSamples, OfChannels):
    """Show what models take and give, their coupled channels, what is free in them, and what is frozen and why."""

    examples: ClassVar[tuple[str, ...]] = (
        "inspect model.onnx",
        "inspect model.onnx --html model.html",
        "inspect model.onnx --sensitivity --data train.npz --plot curves.svg",
    )
    models: tuple[Path, ...] = _model("The models", metavar="MODEL", is_many=True)
    data: str | None = _data("Samples on which to measure the sensitivity", group="sensitivity")
    keep: tuple[str, ...] = same_option(AllocateOptions, "keep")
    html: Path | None = _written(
        "File to write a page to that shows the graph and what each width costs; for one model", metavar="FILE"
    )
    cost_table: Path | None = same_option(AllocateOptions, "cost_table")
    sensitivity: bool = option(
        False, "Measure the output error at several widths of each group", group="sensitivity", is_common=True
    )
    score: str = same_option(SensitivityOptions, "score", suggested=tuple(SCORE_FUNCTIONS))
    samples: int = same_option(SensitivityOptions, "samples")
    ratios: tuple[float, ...] = same_option(SensitivityOptions, "ratios")
    repair: bool = same_option(SensitivityOptions, "repair")
    plot: Path | None = _written(
        f"File to draw the result to: {', '.join(SUFFIXES)}", metavar="FILE", group="sensitivity", suffixes=SUFFIXES
    )


@dataclass(frozen=True, kw_only=True)
class Prune(Choosing, Saving):
    """Remove channels, prove the result correct, and write it with its plan."""

    examples: ClassVar[tuple[str, ...]] = (
        "prune model.onnx -o small.onnx --target macs=0.5 --blind",
        "prune model.onnx -o small.onnx --target latency=0.5 --data train.npz",
    )
    model: Path = _model("The original")
    target: AnyTargets | None = _optional_target
    max_loss: float | None = _MAX_LOSS
    rounds: int = same_option(Iterate, "rounds")
    plan: Path | None = _written("File to write the plan to (default: OUTPUT.plan.json)", suffixes=_JSON)
    merged: Path | None = _MERGED
    no_verify: bool = option(False, "Skip the proof, which runs both models and compares their outputs")
    processes: int | None = option(
        None,
        "Number of processes that divide the samples among them for scores and repair; the result has the same bytes",
        read=positive,
    )
    executor: str | None = _EXECUTOR


@dataclass(frozen=True, kw_only=True)
class VerifyFile(OnSamples):
    """Check a pruned, trained or deployed file against its original."""

    examples: ClassVar[tuple[str, ...]] = ("verify model.onnx small.onnx",)
    original: Path = _model("The original")
    data: str | None = _data("Samples to compare on (default: random)")
    pruned: Path = _model("The file to check; a deployed file is traced back through its manifests")
    plan: Path | None = _read("Plan of the pruned file (default: PRUNED.plan.json)", suffixes=_JSON)
    step: str | None = _step
    manifest: Path | None = _read(
        "Manifest of the deploy run that wrote the file (default: PRUNED.manifest.json, or another in its folder)",
        suffixes=_JSON,
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
    plan: Path = _model("The plan", suffixes=_JSON)
    step: str | None = _step


@dataclass(frozen=True, kw_only=True)
class Distill(DistillOptions, Evaluating, Tracing, FromRecipe):
    """Fine-tune a pruned model against its original, without labels."""

    examples: ClassVar[tuple[str, ...]] = ("distill model.onnx small.onnx -o trained.onnx --data train.npz",)
    teacher: Path = _model("The original")
    data: str | None = _data("Samples to train with")
    student: Path = _model("The pruned model")
    plan: Path | None = _read("Plan that pruned the student (default: STUDENT.plan.json)", suffixes=_JSON)


@dataclass(frozen=True, kw_only=True)
class Compress(Compressing, Tracing):
    """Prune, repair, distill, prove and measure in one run; write a report, a recipe and a manifest."""

    examples: ClassVar[tuple[str, ...]] = (
        "compress model.onnx -o small.onnx --data images/",
        "compress model.onnx -o small.onnx --data train.npz --eval test.npz",
        "compress model.onnx -o small.onnx --data images/ --target latency=5ms",
    )
    target: AnyTargets | None = _optional_target
    max_loss: float | None = _MAX_LOSS
    rounds: int = same_option(Iterate, "rounds")
    precision: str = option(
        PRECISIONS[0],
        "Number format of the result: that of the original (float32), 16-bit floats (float16), 8-bit integers wherever "
        "possible (int8), weights stored in 4 bits and computed with in float32 (int4), or what serves the target "
        "(auto): 8-bit integers only in the operators that are faster in them on this computer, 16-bit floats if those "
        "are faster or, for a target of bytes, weights in as few bits as the loss allows; latency and loss are those "
        "in this format; the pruned float model is written beside it",
        choices=PRECISIONS,
        is_common=True,
    )
    like: Path | None = _read(
        "Plan whose channels to remove, instead of choosing channels", metavar="PLAN", is_recorded=True, suffixes=_JSON
    )
    plan: Path | None = _written("File to write the plan to (default: OUTPUT.plan.json)", suffixes=_JSON)
    merged: Path | None = _MERGED
    report: bool = option(True, "Measure latency, and write OUTPUT.report.html, .md and .json")


@dataclass(frozen=True, kw_only=True)
class Sweep(Compressing):
    """Compress to several targets with the same scores, time the models side by side, and pick one."""

    examples: ClassVar[tuple[str, ...]] = ("sweep model.onnx -o out --targets latency=0.7,0.5 --data train.npz",)
    output: Path = _folder
    weights: str = same_option(Saving, "weights")
    targets: tuple[AnyTargets, ...] = option(
        MISSING,
        "Targets of the models, for example latency=0.7,0.5,0.3",
        flag="--targets",
        read=targets,
        metavar="KIND=AMOUNT,…",
        suggested=tuple(f"{kind}=0.7,0.5,0.3" for kind in ALL_KINDS),
    )
    max_loss: float | None = option(
        None,
        "Largest loss of the metric against the original; picks the fastest model within it",
        read=loss_bound,
        metavar="NUMBER",
        renamed_from="most_lost",
        is_common=True,
    )
    nested: bool = option(
        False, "Remove from each model what the larger ones lack, and more, and write one plan with a step for each"
    )
    jobs: int | None = option(
        None, "Number of models compressed in parallel (default: the number of cores)", read=positive
    )
    executor: str | None = _EXECUTOR


@dataclass(frozen=True, kw_only=True)
class Reproduce(Request):
    """Repeat the run that a manifest records, and compare the files byte for byte."""

    manifest: Path = _model("The manifest", suffixes=_JSON)
    output: Path = _folder
    model: Path | None = _read(f"The original, {_IF_MOVED}", suffixes=(".onnx",))
    data: Path | None = _read(f"The data, {_IF_MOVED}")
    watch: Path | None = _read(f"The data of --watch, {_IF_MOVED}")
    cost_table: Path | None = _read(f"The cost table, {_IF_MOVED}", suffixes=_JSON)
    plan: Path | None = _read(f"The plan of --like, {_IF_MOVED}", suffixes=_JSON)
    profile: Path | None = _read(f"The profile of the target, {_IF_MOVED}", metavar="FILE.toml", suffixes=(".toml",))
    classes: Path | None = _read(f"The file of --classes, {_IF_MOVED}")
    trust: tuple[str, ...] = same_option(FromRecipe, "trust")


@dataclass(frozen=True, kw_only=True)
class Audit(Request):
    """Collect a file, its original, plan, manifest and report with the outcome of verify in one folder or archive."""

    file: Path = _model("A file that compress or deploy wrote, or its manifest", metavar="OUTPUT|MANIFEST")
    output: Path = option(
        MISSING, "Folder, or zip archive, to write", flag="-o/--output", read=Path, takes="file",
        metavar="FOLDER|FILE.zip", is_output=True, is_recorded=False,
    )  # fmt: skip  # an option
    model: Path | None = _read(f"The original, {_IF_MOVED}")
    plan: Path | None = _read(f"The plan, {_IF_MOVED}")
    via: tuple[Path, ...] = same_option(VerifyFile, "via")
    without_original: bool = option(False, "Leave out the original, and name its SHA-256 only")


@dataclass(frozen=True, kw_only=True)
class Deploy(Evaluating, Saving):
    """Convert a model for its target: sizes, opset, int8, half precision, .ort, C; compare the outputs of each step."""

    examples: ClassVar[tuple[str, ...]] = (
        "deploy small.onnx -o int8.onnx --int8 --data train.npz",
        "deploy small.onnx -o fixed.onnx --batch 1 --opset 17 --ort fixed.ort",
        "deploy small.onnx -o fixed.onnx --batch 1 --c-source small.c",
    )
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
        is_common=True,
    )
    batch: int | None = option(None, "Fixed batch size of all inputs", read=positive, metavar="N", is_common=True)
    opset: int | None = option(None, "ONNX opset version to convert to", read=positive, metavar="N", is_common=True)
    ort: Path | None = _written(
        "File to write the model to in onnxruntime's .ort format as well",
        metavar="FILE",
        is_recorded=True,
        suffixes=(".ort",),
        is_common=True,
    )
    ort_level: str = option(
        "extended",
        "Graph optimisation level of the .ort file; 'all' fits only processors like this one",
        choices=LEVELS,
    )
    fold: bool = option(
        False, "Compute constants, and make batch normalisation part of linear operators, before weights are converted"
    )
    merge: str | None = option(
        None,
        "Multiply linear operators with nothing but affine ones between them into one, where that saves "
        "multiply-accumulates (macs), bytes of weights, or time measured here (latency)",
        choices=MEASURES,
    )
    c_source: Path | None = _written(
        "File to write the model to as C, for targets without a runtime, with a header beside it; implies --fold",
        metavar="FILE.c",
        is_recorded=True,
        suffixes=(".c",),
        is_common=True,
    )
    int8: bool = option(
        False, "Quantise weights and activations to int8, which needs --data", group="int8", is_common=True
    )
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
    int8_form: str | None = option(
        None,
        "Quantised operators between QuantizeLinear and DequantizeLinear (qdq), or integer operators such as "
        f"QLinearConv (default: {Quantization.form}; qoperator with --c-source)",
        choices=INT8_FORMS,
        group="int8",
    )
    integer_io: bool = option(
        False,
        "Take and give the integers of a quantised model, instead of float32 that it quantises and dequantises; their "
        "scales and zero points are in the manifest, the metadata of the model and the header of the C source",
        group="int8",
        is_common=True,
    )
    per_tensor: bool = option(False, "Use one scale per weight tensor instead of one per channel", group="int8")
    exclude: tuple[str, ...] = option(
        (),
        "Nodes, weights, tensors or operators that are not quantised (* and ? allowed); may be repeated",
        metavar="PATTERN",
        is_many=True,
        group="int8",
    )
    float_nodes: tuple[str, ...] = option(
        (),
        "Name of the first output of a node that stays float; may be repeated (names that the model lacks are ignored)",
        flag="--float-node",
        metavar="OUTPUT",
        is_many=True,
        group="int8",
    )
    seed: int = option(Quantization.seed, "Seed of the random choice of samples", read=natural, group="int8")
    weight_bits: int | None = option(
        None,
        "Store weights in 4 or 8 bits, fitted to --data, and compute in float32",
        read=_bits,
        metavar="4|8",
        group="weights in few bits",
        is_common=True,
    )
    wide: tuple[str, ...] = option(
        (),
        "Name of a weight that is stored in 8 bits where the others are in 4; may be repeated (names that the model "
        "lacks are ignored)",
        flag="--wide-weight",
        metavar="WEIGHT",
        is_many=True,
        group="weights in few bits",
    )
    half: str | None = option(
        None,
        "Half-precision type to convert to; bfloat16 is for storage only, as onnxruntime cannot compute with it",
        choices=HALVES,
        group="half precision",
        is_common=True,
    )
    storage_only: bool = option(
        False, "Store the weights in half precision, but compute in float32", group="half precision"
    )


@dataclass(frozen=True, kw_only=True)
class Bench(OnSamples, OfSizes):
    """Measure the latency and memory of models in onnxruntime, side by side."""

    examples: ClassVar[tuple[str, ...]] = (
        "bench model.onnx small.onnx --threads 1,4 --batch 1,16",
        "bench model.onnx --provider cuda:device=0 --io-binding --runs 200",
    )
    models: tuple[Path, ...] = option(
        (), "The models; the first is the baseline of the others", flag=" ", read=Path, takes="file", is_recorded=False,
        suffixes=(".onnx",), metavar="MODEL", is_many=True,
    )  # fmt: skip  # what and how
    batch: tuple[int | None, ...] = option(
        (None,), "Batch sizes to measure (default: the model's)", read=commas(positive), metavar="N,N"
    )
    threads: tuple[int, ...] = option(
        (1,), "Numbers of intra-op threads to measure", read=commas(positive), metavar="N,N"
    )
    provider: tuple[str, ...] = option(
        (),
        "Execution provider of onnxruntime, as in tensorrt:device=0,precision=fp16: "
        f"{', '.join(providers.SHORT_NAMES)}, or a full name; may be repeated (default: cpu)",
        read=providers.read,
        metavar="NAME[:KEY=VALUE,…]",
        takes="provider",
        is_many=True,
    )
    seconds: float = option(4.0, "Seconds to measure each setting for", read=above_zero)
    warmup: int = option(Method.warmup, "Runs of each model that are not timed, before the others", read=natural)
    runs: int | None = option(
        None, "Timed runs of each model, instead of --seconds (default: as many as --seconds allows)", read=positive
    )
    io_binding: bool = option(
        False, "Keep inputs and outputs on the device of the provider, so that no run copies them"
    )
    times: tuple[Path, ...] = option(
        (),
        "Times of whole models that the runner printed on another device, instead of a measurement; may be repeated",
        flag="--from/--times",
        read=Path,
        metavar="FILE.csv",
        takes="file",
        is_many=True,
        is_recorded=False,
        suffixes=(".csv",),
    )
    runner: Path | None = _written(
        "File to write the source of the runner to, which times models on targets without Python (C++)",
        metavar="FILE.cpp",
        suffixes=(".cpp",),
    )
    csv: Path | None = _written(
        "File to write the latencies to: one row a setting and model", metavar="FILE.csv", suffixes=(".csv",)
    )
    data: str | None = _data("Samples to use as inputs (default: random)")
    plot: Path | None = _written(
        f"File to draw the result to: {', '.join(SUFFIXES)}", metavar="FILE", suffixes=SUFFIXES, is_common=True
    )


@dataclass(frozen=True, kw_only=True)
class Latency(OfChannels):
    """Measure the latency of a model's layers, and write it as a cost table for --cost-table."""

    examples: ClassVar[tuple[str, ...]] = (
        "latency model.onnx -o table.json",
        "latency model.onnx --template layers.csv",
        "latency model.onnx -o table.json --timings layers.csv --source phone",
    )
    model: Path = _model("The model")
    output: Path | None = option(
        None, "File to write", flag="-o/--output", read=file, metavar="FILE", takes="file", is_output=True,
        is_recorded=False, suffixes=(".json",),
    )  # fmt: skip  # what and how
    timings: Path | None = _read(
        "Times of the layers on another device, instead of a measurement on this machine: the columns of --template",
        metavar="FILE.csv",
        suffixes=(".csv",),
    )
    template: Path | None = _written(
        "File to write the layers and widths to that --timings needs the times of",
        metavar="FILE.csv",
        suffixes=(".csv",),
    )
    source: str | None = option(
        None, "What --timings was measured on, for the table and the messages (default: the name of the file)"
    )
    seed: int = option(0, "Seed of the random choice of widths to measure", read=natural)
    latency_threads: int = same_option(AllocateOptions, "latency_threads")
    latency_batch: int | None = same_option(AllocateOptions, "latency_batch")
    latency_provider: str = same_option(AllocateOptions, "latency_provider")


@dataclass(frozen=True, kw_only=True)
class Demo(Request):
    """Comb, prune, repair, distill and verify the embedded example."""

    out: Path | None = option(
        None, "Folder to write the files to (default: a new temporary folder)", read=Path, metavar="FOLDER"
    )
    target: AnyTargets = _target(*defaults.DEMO_TARGET)
    epochs: int = same_option(DistillOptions, "epochs", default=20, help="Passes over the data")
    seed: int = option(0, "Seed of the random choice and of training", read=natural)


@dataclass(frozen=True, kw_only=True)
class Operators(Request):
    """List the operators through which channels can be pruned."""

    missing: bool = option(False, "List the standard operators without a rule instead")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print the completion script of a shell."""

    shell: str = option(MISSING, "The shell to complete in", flag=" ", choices=SHELLS)


COMMANDS: dict[str, type] = {
    "inspect": Inspect, "prune": Prune, "verify": VerifyFile, "apply": Apply, "distill": Distill, "compress": Compress,
    "sweep": Sweep, "reproduce": Reproduce, "audit": Audit, "deploy": Deploy, "bench": Bench, "latency": Latency,
    "demo": Demo, "operators": Operators, "completion": Completion,
}  # fmt: skip  # a table
