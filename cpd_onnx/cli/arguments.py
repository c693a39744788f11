"""What can be said on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from cpd_onnx.budget.allocation import KINDS, SPREADS
from cpd_onnx.cli import demo
from cpd_onnx.data.metrics import IGNORED, METRICS
from cpd_onnx.data.open import SYNTHETIC
from cpd_onnx.deploy.float16 import HALVES
from cpd_onnx.deploy.profiles import profile_names
from cpd_onnx.deploy.quantize import CALIBRATIONS
from cpd_onnx.deploy.quantize import SAMPLES as CALIBRATED
from cpd_onnx.deploy.steps import LEVELS
from cpd_onnx.io.streams import printable
from cpd_onnx.ir.model import PLACES
from cpd_onnx.passes.repair import SAMPLES as REPAIR_SAMPLES
from cpd_onnx.passes.sensitivity import SAMPLES as SENSITIVITY_SAMPLES
from cpd_onnx.passes.sensitivity import SHARES
from cpd_onnx.report.figures import SUFFIXES
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import SAMPLES, SCORERS
from cpd_onnx.version import __version__

_LARGEST = 2**31 - 1
"""The largest whole number that every library below takes."""
_DIGITS = 4000
"""Python refuses to read numbers of more than 4300."""
LOSSES = ("kl", "dist", "mse", "cosine")
"""How outputs can be compared."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, and show what was typed without obeying it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with exit code 2."""
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it gives is the name of one."""
    parser = _Parser(
        prog="cpd-onnx", description="Make a trained ONNX model smaller and faster, and prove that nothing broke."
    )
    parser.add_argument("--version", action="version", version=f"cpd-onnx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_prune(commands)
    _add_verify(commands)
    _add_apply(commands)
    _add_distill(commands)
    _add_compress(commands)
    _add_sweep(commands)
    _add_reproduce(commands)
    _add_deploy(commands)
    _add_bench(commands)
    _add_table(commands)
    _add_demo(commands)
    _add_operators(commands)
    _add_completion(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="show the coupled channels, and what is kept and why")
    parser.add_argument("model", type=Path)
    _add_keep(parser)
    measured = parser.add_argument_group("sensitivity", "what the outputs lose with the channels of each group alone")
    measured.add_argument("--sensitivity", action="store_true", help="measure it, at some widths of each group")
    measured.add_argument("--data", help=f"inputs that it is measured on: {DATA}")
    measured.add_argument(
        "--score", default="reconstruction", help="says which channels go first (default: reconstruction)"
    )
    measured.add_argument(
        "--samples", type=_positive, default=SENSITIVITY_SAMPLES, help=f"default: {SENSITIVITY_SAMPLES}"
    )
    measured.add_argument(
        "--shares",
        type=_shares,
        default=SHARES,
        metavar="S,S",
        help=f"of the channels that stay (default: {','.join(f'{share:g}' for share in SHARES)}; 0 is one channel)",
    )
    measured.add_argument(
        "--repair",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit what consumes the group anew before it is measured (default: yes)",
    )
    _add_plot(measured)
    _add_images(parser)
    _add_input_shape(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="inspect")


def _add_prune(commands: Any) -> None:
    parser = commands.add_parser("prune", help="remove channels, prove the result, write it and its plan")
    parser.add_argument("model", type=Path)
    _add_output(parser)
    _add_target(parser, "channels", 0.5)
    _add_choice(parser, None)
    _add_latency(parser)
    _add_repair(parser)
    parser.add_argument("--rounds", type=_positive, default=1, help="of scoring, pruning and repairing (default: 1)")
    parser.add_argument("--seed", type=_natural, default=0, help="of everything random")
    _add_keep(parser)
    parser.add_argument("--data", help=f"inputs that scores, repair and proof look at: {DATA} (default: none)")
    _add_images(parser)
    parser.add_argument("--plan", type=Path, help="where the plan goes (default: OUTPUT.plan.json)")
    parser.add_argument("--no-verify", action="store_true", help="do not run the models to compare them")
    _add_allow_inconclusive(parser)
    _add_input_shape(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="prune")


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check a pruned, trained or deployed file against its original")
    parser.add_argument("original", type=Path)
    parser.add_argument("pruned", type=Path, help="the file to check; what deploy wrote is followed back")
    parser.add_argument("--plan", type=Path, help="of the pruned file (default: PRUNED.plan.json)")
    parser.add_argument(
        "--manifest", type=Path, help="of the deploy that made the file (default: PRUNED.manifest.json, or one beside)"
    )
    parser.add_argument(
        "--via",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="file that a deployed one was made of, where it is not beside the manifest; may be repeated",
    )
    parser.add_argument("--data", help=f"inputs to compare on: {DATA} (default: random)")
    _add_images(parser)
    _add_json(parser)
    _add_force(parser, "overwrite the JSON file")
    parser.set_defaults(run="verify")


def _add_apply(commands: Any) -> None:
    parser = commands.add_parser("apply", help="replay a plan, bit for bit")
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    _add_output(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="apply")


def _add_distill(commands: Any) -> None:
    parser = commands.add_parser("distill", help="fine-tune a pruned model against its original, without labels")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    _add_output(parser)
    parser.add_argument("--data", help=f"training inputs: {DATA}")
    _add_images(parser)
    _add_training(parser)
    loss = _add_comparison(parser)
    loss.add_argument("--plan", type=Path, help="says which channels are shared (default: STUDENT.plan.json)")
    _add_run(parser)
    _add_evaluation(parser)
    _add_recipe(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="distill")


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser(
        "compress", help="all in one go: prune, repair, distill, prove, measure; with a report, a recipe and a manifest"
    )
    parser.add_argument("model", type=Path)
    _add_output(parser)
    _add_target(parser, "macs", 0.5)
    parser.add_argument("--rounds", type=_positive, default=1, help="of pruning and distilling (default: 1)")
    parser.add_argument("--like", type=Path, metavar="PLAN", help="remove what this plan removes, choose nothing")
    _add_compression(parser)
    parser.add_argument("--plan", type=Path, help="where the plan goes (default: OUTPUT.plan.json)")
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure, and write OUTPUT.report.html, .md and .json (default: yes)",
    )
    _add_run(parser)
    _add_recipe(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="compress")


def _add_allow_inconclusive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-inconclusive",
        action="store_true",
        help="write the model even if the inputs that were tried show too little to prove it right or wrong",
    )


def _add_compression(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help=f"inputs to choose, repair and train with: {DATA} (default: none)")
    _add_allow_inconclusive(parser)
    _add_images(parser)
    _add_choice(parser, None, "optimal with data, else uniform")
    _add_repair(parser)
    parser.add_argument(
        "--distill",
        action=argparse.BooleanOptionalAction,
        help="train against the original (default: where there is data, and torch)",
    )
    parser.add_argument(
        "--sensitivity",
        action=argparse.BooleanOptionalAction,
        help="show in the report what the outputs lose with each group (default: with data, if it takes a minute)",
    )
    _add_latency(parser)
    _add_keep(parser)
    _add_training(parser)
    _add_comparison(parser)
    _add_evaluation(parser)
    _add_input_shape(parser)


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep", help="compress to several targets by the same scores, time all of them in turns, pick one"
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--weights", choices=PLACES, default=PLACES[0], help="where they go (default: as-is)")
    parser.add_argument(
        "--targets", type=_targets, required=True, metavar="KIND=FRACTION,…", help="as in latency=0.7,0.5,0.3"
    )
    parser.add_argument(
        "--most-lost", type=not_negative, metavar="NUMBER", help="pick the fastest that loses no more of the metric"
    )
    parser.add_argument("--jobs", type=_positive, help="models that are made at a time (default: one a core)")
    parser.add_argument(
        "--executor",
        metavar="MODULE:FUNCTION",
        help="gives a concurrent.futures.Executor that makes them elsewhere, with the same folders",
    )
    _add_compression(parser)
    _add_recipe(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="sweep")


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser("reproduce", help="repeat the run of a manifest, and compare every byte")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--model", type=Path, help="the original, if it has moved or lies outside the manifest's folder"
    )
    for name, what in (("data", "data"), ("watch", "data to watch"), ("cost-table", "cost table")):
        parser.add_argument(f"--{name}", dest=name, type=Path, help=f"the {what}, likewise")
    parser.add_argument("--plan", type=Path, help="the plan that was carried out, likewise")
    parser.add_argument("--profile", type=Path, metavar="FILE.toml", help="the profile of the target, likewise")
    _add_trust(parser, "the manifest")
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="reproduce")


def _add_deploy(commands: Any) -> None:
    parser = commands.add_parser(
        "deploy", help="make a model ready for its target: sizes, opset, int8 or half floats, .ort; each step compared"
    )
    parser.add_argument("model", type=Path)
    _add_output(parser)
    _add_profile(parser, "its batch, opset and IR version, and how it quantises; says what it objects to")
    parser.add_argument(
        "--fix",
        type=_sizes,
        action="append",
        default=[],
        metavar="NAME=SIZE,SIZE",
        help="shape of an input, or size of a symbolic axis; may be repeated",
    )
    parser.add_argument("--batch", type=_positive, metavar="N", help="samples at a time, for good")
    parser.add_argument("--opset", type=_positive, metavar="N", help="convert to this operator set")
    parser.add_argument("--ort", type=Path, metavar="FILE", help="write it in onnxruntime's own format too")
    parser.add_argument(
        "--ort-level",
        choices=LEVELS,
        default="extended",
        help="how far onnxruntime optimises that; all: for processors like this one only (default: extended)",
    )
    int8 = parser.add_argument_group("int8", "QuantizeLinear and DequantizeLinear, by onnxruntime's quantiser")
    int8.add_argument("--int8", action="store_true", help="quantise weights and activations; needs --data")
    int8.add_argument("--data", help=f"inputs to calibrate and compare on: {DATA} (default: random, to compare only)")
    int8.add_argument("--samples", type=_positive, metavar="N", help=f"to calibrate on (default: {CALIBRATED})")
    int8.add_argument("--calibration", choices=CALIBRATIONS, help=f"default: {CALIBRATIONS[0]}")
    int8.add_argument("--per-tensor", action="store_true", help="one scale for each weight, not for each channel")
    int8.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="nodes, weights, tensors or operators that stay float (* and ? allowed); may be repeated",
    )
    int8.add_argument("--seed", type=_natural, default=0, help="of the choice of samples")
    half = parser.add_argument_group("half floats")
    half.add_argument("--half", choices=HALVES, help="bfloat16 is stored only, as onnxruntime cannot compute with it")
    half.add_argument("--storage-only", action="store_true", help="store float16, compute in float32")
    _add_images(parser)
    _add_evaluation(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="deploy", command=parser)


def _add_profile(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--profile", metavar="NAME|FILE.toml", help=f"target, {', '.join(profile_names())} or yours: {what}"
    )


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="how long onnxruntime takes for models, side by side")
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="the first is what the others count against"
    )
    parser.add_argument("--batch", type=_counts, default=(None,), metavar="N,N", help="samples at a time")
    parser.add_argument("--threads", type=_counts, default=(1,), metavar="N,N", help="of an operator (default: 1)")
    parser.add_argument(
        "--provider",
        action="append",
        default=[],
        help="of onnxruntime; may be repeated (default: the CPU's)",
    )
    parser.add_argument("--seconds", type=_above_zero, default=4.0, help="for each setting (default: 4)")
    parser.add_argument("--data", help=f"inputs: {DATA} (default: random)")
    _add_images(parser)
    _add_input_shape(parser)
    _add_plot(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="bench")


def _add_images(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images of a folder", "(pixels * scale - mean) / std, in the model's layout")
    images.add_argument("--image-mean", type=_numbers, default=(0.0,), metavar="M,M,M", help="default: 0")
    images.add_argument("--image-std", type=_numbers, default=(1.0,), metavar="S,S,S", help="default: 1")
    images.add_argument("--image-scale", type=_above_zero, default=1 / 255, help="of pixels of 0..255 (default: 1/255)")
    images.add_argument("--image-order", choices=("RGB", "BGR"), default="RGB", help="default: RGB")
    images.add_argument("--image-size", type=_height_width, metavar="H,W", help="where the model leaves it free")
    images.add_argument(
        "--image-resize", type=_positive, metavar="N", help="shorter side, then the middle (default: squeeze)"
    )


def _add_repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repair",
        action=argparse.BooleanOptionalAction,
        help="fit what is left to the original by least squares (default: where there is data)",
    )
    parser.add_argument(
        "--repair-samples",
        type=_positive,
        default=REPAIR_SAMPLES,
        help=f"that a repair looks at (default: {REPAIR_SAMPLES})",
    )


def _add_choice(parser: argparse.ArgumentParser, score: str | None, spread: str = "uniform") -> None:
    usual = score or "reconstruction with data, else l2"
    parser.add_argument(
        "--score", default=score, help=f"ranks channels: {', '.join(SCORERS)} or module:function (default: {usual})"
    )
    parser.add_argument(
        "--samples", type=_positive, help=f"that a score looks at (default: {SAMPLES}; reconstruction 512)"
    )
    parser.add_argument("--score-labels", action="store_true", help="ask for their labels, not for the model's answers")
    parser.add_argument(
        "--spread",
        choices=SPREADS,
        help="the same share from each group; all channels compete; those of like groups do; or the widths that do the "
        f"least damage (default: {spread}; optimal for latency and with reconstruction)",
    )
    parser.add_argument("--multiple", type=int, help="widths that remain are multiples of this (default: 1)")
    _add_profile(parser, "sets --multiple; says what the target objects to")
    parser.add_argument(
        "--min-share", type=_share, default=0.0, metavar="SHARE", help="of each group that stays at least (default: 0)"
    )
    parser.add_argument(
        "--max-share", type=_share, default=1.0, metavar="SHARE", help="of each group that stays at most (default: 1)"
    )
    parser.add_argument(
        "--width",
        type=_bounds,
        action="append",
        default=[],
        metavar="PATTERN=LOW..HIGH",
        help="shares of single groups that may stay, as in 'layer1.*=0.25..1'; may be repeated",
    )


def _add_latency(parser: argparse.ArgumentParser, *, with_table: bool = True) -> None:
    latency = parser.add_argument_group("latency", "how it is measured, with onnxruntime")
    latency.add_argument(
        "--latency-threads",
        type=_natural,
        default=1,
        metavar="N",
        help="of an operator; 0: its own choice (default: 1)",
    )
    latency.add_argument(
        "--latency-batch", type=_positive, metavar="N", help="samples at a time (default: the model's)"
    )
    latency.add_argument("--latency-provider", default=Setting.provider, help="of onnxruntime (default: the CPU's)")
    if with_table:
        latency.add_argument(
            "--cost-table", type=Path, metavar="FILE", help="made by 'latency' elsewhere; nothing is measured here"
        )


def _add_table(commands: Any) -> None:
    parser = commands.add_parser("latency", help="measure where a model's time goes, as a cost table for 'prune'")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=_file, required=True)
    parser.add_argument("--seed", type=_natural, default=0, help="of the widths that are measured")
    _add_latency(parser, with_table=False)
    _add_input_shape(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="latency")


def _add_training(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=_positive, default=10, help="passes over the data (default: 10)")
    training.add_argument("--steps", type=_positive, help="updates in all, instead of epochs")
    training.add_argument("--batch-size", type=_positive, default=64, help="samples in an update (default: 64)")
    training.add_argument("--lr", type=_above_zero, default=1e-3, help="learning rate (default: 0.001)")
    training.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default: adamw")
    training.add_argument("--warmup", type=_share, default=0.05, metavar="SHARE", help="of the steps (default: 0.05)")
    training.add_argument("--weight-decay", type=not_negative, default=1e-4, help="of matrices (default: 0.0001)")
    training.add_argument("--clip-norm", type=not_negative, default=1.0, help="of the gradient; 0: any (default: 1)")
    training.add_argument("--ema", type=_share, default=0.0, metavar="DECAY", help="result is an average (default: 0)")
    training.add_argument(
        "--batch-norm",
        choices=("auto", "frozen", "train", "restore", "calibrate"),
        default="auto",
        help="stored statistics, those of the batch, also where they were folded into convolutions, or only estimated "
        "anew without training (default: restore where batches have 16 samples, else frozen)",
    )
    training.add_argument("--freeze", action="append", default=[], metavar="NAME", help="do not train this initializer")
    training.add_argument("--flip", action="store_true", help="mirror half of the images")
    training.add_argument("--shift", type=_natural, default=0, help="move images by up to so many pixels")
    training.add_argument("--seed", type=_natural, default=0, help="of order and augmentation")
    training.add_argument("--threads", type=_natural, default=0, help="of torch on the CPU (default: its own choice)")
    training.add_argument("--device", default="auto", help="auto, cpu or cuda (default: a GPU if there is one)")
    training.add_argument("--mixed-precision", action="store_true", help="bfloat16 where that is safe")
    training.add_argument(
        "--teacher-runtime",
        choices=("auto", "onnxruntime", "torch"),
        default="auto",
        help="what runs the teacher (default: onnxruntime on the CPU, torch on a GPU)",
    )
    training.add_argument(
        "--teacher-cache", type=Path, metavar="FILE", help="keep the teacher's answers, ask once about each sample"
    )


def _add_comparison(parser: argparse.ArgumentParser) -> Any:
    loss = parser.add_argument_group("what is compared")
    loss.add_argument("--temperature", type=_above_zero, default=4.0, help="softens scores (default: 4)")
    loss.add_argument(
        "--loss",
        action="append",
        default=[],
        metavar="OUTPUT=KIND",
        help=f"one of {', '.join(LOSSES)} (default: seen from the teacher's answers)",
    )
    loss.add_argument("--weight", action="append", default=[], metavar="OUTPUT=NUMBER", help="in the loss (default: 1)")
    loss.add_argument("--hidden", type=_natural, default=0, metavar="N", help="inner tensors compared too (default: 0)")
    loss.add_argument("--hidden-weight", type=not_negative, default=1.0, help="of these in the loss (default: 1)")
    loss.add_argument(
        "--label-weight",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="of labels in the loss (default: 0, none needed)",
    )
    loss.add_argument("--ignore-label", type=int, default=IGNORED, help=f"of what does not count (default: {IGNORED})")
    return loss


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--checkpoint", type=Path, help="default: OUTPUT.checkpoint, removed at the end")
    run.add_argument("--checkpoint-seconds", type=not_negative, default=300.0, help="between two (default: 300)")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    run.add_argument("--log", type=Path, metavar="CSV", help="table of the losses, one for each round")
    run.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="the same for TensorBoard")
    run.add_argument("--watch", metavar="DATA", help="score the student on this data while it trains")
    run.add_argument("--watch-every", type=_positive, default=100, metavar="STEPS", help="default: 100")
    run.add_argument(
        "--patience",
        type=_natural,
        default=0,
        metavar="N",
        help="stop after N scores without a new best; take that",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", type=Path, help="take options from this file, as it is written to OUTPUT.recipe.toml"
    )
    _add_trust(parser, "a recipe")
    parser.set_defaults(command=parser)


def _add_trust(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help=f"run this function if {what} names it; may be repeated (default: none)",
    )


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval", metavar="DATA", help="measure the models on this data")
    parser.add_argument(
        "--metric", default="top1", help=f"one of {', '.join(METRICS)} or module:function (default: top1)"
    )


TRAINING = (
    "epochs", "steps", "batch_size", "lr", "optimizer", "warmup", "weight_decay", "clip_norm", "ema", "temperature",
    "label_weight", "ignore_label", "hidden", "hidden_weight", "batch_norm", "flip", "shift", "seed", "threads",
    "device", "mixed_precision", "teacher_runtime",
    "teacher_cache",
)  # fmt: skip
"""Names of options, and of the fields of `DistillOptions` that they go to."""


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="comb, prune, distill and verify the embedded example")
    parser.add_argument("--out", type=Path, help="folder for the files that it makes (default: none are kept)")
    _add_target(parser, *demo.TARGET)
    parser.add_argument("--epochs", type=_positive, default=demo.EPOCHS, help=f"of training (default: {demo.EPOCHS})")
    parser.add_argument("--seed", type=_natural, default=0, help="of the random choice and of training")
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run="demo")


def _add_operators(commands: Any) -> None:
    parser = commands.add_parser("operators", help="list the operators that channels are followed through")
    parser.add_argument("--missing", action="store_true", help="the standard operators that they are not")
    _add_json(parser)
    _add_force(parser, "overwrite the JSON file")
    parser.set_defaults(run="operators")


def _add_completion(commands: Any) -> None:
    parser = commands.add_parser("completion", help="print what a shell reads to complete commands and options")
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    parser.set_defaults(run="completion")


DATA = f".npz, folder of images, module:function, or {SYNTHETIC!r}"
"""What data may be."""


def _add_target(parser: argparse.ArgumentParser, kind: str, fraction: float) -> None:
    parser.add_argument(
        "--target",
        type=_target,
        default=(kind, fraction),
        metavar="KIND=FRACTION",
        help=f"what may remain of {', '.join(KINDS)} (default: {kind}={fraction:g})",
    )


def _add_keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="groups, weights or nodes that are not touched (* and ? allowed); may be repeated",
    )


def _add_input_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-shape",
        type=_shape,
        action="append",
        default=[],
        metavar="NAME:1,3,224,224",
        help="sizes of an input that the file leaves open; may be repeated",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=_file, required=True)
    parser.add_argument(
        "--weights",
        choices=PLACES,
        default=PLACES[0],
        help="where they go: as the original has them, inside the file (below 2 GiB), or beside it (default: as-is)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")


def _add_plot(parser: Any) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw the result: {', '.join(SUFFIXES)}")


def _add_force(parser: argparse.ArgumentParser, what: str = "overwrite files that exist") -> None:
    parser.add_argument("--force", action="store_true", help=what)


def _target(text: str) -> tuple[str, float]:
    kind, _, fraction = text.partition("=")
    try:
        return kind, float(fraction)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=FRACTION, as in macs=0.5") from error


def _targets(text: str) -> tuple[tuple[str, float], ...]:
    """One kind for all, or each with its own."""
    kind, sign, fractions = text.partition("=")
    parts = fractions.split(",") if sign else []
    return tuple(_target(part if "=" in part else f"{kind}={part}") for part in parts or [text])


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:SIZE,SIZE,…") from error
    if not name or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:SIZE,SIZE,… with sizes above 0")
    return name, shape


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SIZE,SIZE,…")
    return name, tuple(_positive(size) for size in sizes.split(","))


def _bounds(text: str) -> tuple[str, tuple[float, float]]:
    name, _, shares = text.rpartition("=")
    low, dots, high = shares.partition("..")
    try:
        bounds = _share(low), _share(high if dots else low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=LOW..HIGH") from error
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=LOW..HIGH")
    return name, bounds


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NUMBER,NUMBER,…") from error


def _height_width(text: str) -> tuple[int, int]:
    sizes = [_positive(part) for part in text.split(",")]
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHT,WIDTH")
    return sizes[0], sizes[1]


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _file(text: str) -> Path:
    """The path of a file to write: it must have a name."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    return Path(text)


def _natural(text: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS or int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {_LARGEST}")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a whole number from 1 on")
    return int(text)


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def not_negative(text: str) -> float:
    """A number from zero on; ArgumentTypeError otherwise."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def _shares(text: str) -> tuple[float, ...]:
    return tuple(_share(part) for part in text.split(","))
