"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cpd_onnx import demo, pipeline, recipe, report
from cpd_onnx.data import ImageOptions, Source, open_source
from cpd_onnx.errors import CpdError, DataError, ModelError, StoppedError, UnsupportedError
from cpd_onnx.graph import Model, load, require_free, write_atomically
from cpd_onnx.kept import Kept
from cpd_onnx.metrics import IGNORED, METRICS, OF_TWO_MODELS, check_metric, evaluate
from cpd_onnx.passes.allocate import KINDS, SPREADS, Budget, held_groups
from cpd_onnx.passes.comb import Comb, comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.prune import Prune, apply
from cpd_onnx.passes.score import SCORES, Score
from cpd_onnx.passes.verify import Verify, data_feeds, verify_files
from cpd_onnx.plan import Plan, channels_of, load_plan, match
from cpd_onnx.rules import supported_operators, unsupported_operators
from cpd_onnx.state import State
from cpd_onnx.version import __version__

_PIPE_WIDTH = 120
"""Columns of tables that no terminal shows."""
_KEPT_REASONS = 5
"""Reasons for keeping channels that `prune` tells."""
_VERIFY_BATCHES = 2
_LOSSES = ("kl", "dist", "mse", "cosine")


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


out = _console()
err = _console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 for what the user can act on."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "recipe", None) is not None:
            options.command.set_defaults(**recipe.read(options.recipe, options.command))
            options = parser.parse_args(arguments)
        options.run(options)
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 130
    except CpdError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """The `cpd-onnx` command."""
    sys.exit(main())


# What can be said on the command line.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    _add_demo(commands)
    _add_operators(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="show the coupled channels, and what is kept and why")
    parser.add_argument("model", type=Path)
    _add_keep(parser)
    _add_input_shape(parser)
    _add_json(parser)
    _add_force(parser, "overwrite the JSON file")
    parser.set_defaults(run=_inspect)


def _add_prune(commands: Any) -> None:
    parser = commands.add_parser("prune", help="remove channels, prove the result, write it and its plan")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    _add_target(parser, "channels", 0.5)
    _add_choice(parser)
    parser.add_argument("--seed", type=_natural, default=0, help="of the random score")
    _add_keep(parser)
    parser.add_argument("--data", help=f"inputs for the proof: {_DATA} (default: random)")
    _add_images(parser)
    parser.add_argument("--plan", type=Path, help="where the plan goes (default: OUTPUT.plan.json)")
    parser.add_argument("--no-verify", action="store_true", help="do not run the models to compare them")
    _add_input_shape(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run=_prune)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check a pruned file against its original and its plan")
    parser.add_argument("original", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--plan", type=Path, help="default: PRUNED.plan.json")
    parser.add_argument("--data", help=f"inputs to compare on: {_DATA} (default: random)")
    _add_images(parser)
    _add_json(parser)
    _add_force(parser, "overwrite the JSON file")
    parser.set_defaults(run=_verify)


def _add_apply(commands: Any) -> None:
    parser = commands.add_parser("apply", help="replay a plan, bit for bit")
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    _add_force(parser)
    parser.set_defaults(run=_apply)


def _add_distill(commands: Any) -> None:
    parser = commands.add_parser("distill", help="fine-tune a pruned model against its original, without labels")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", help=f"training inputs: {_DATA}")
    _add_images(parser)
    _add_training(parser)
    loss = _add_comparison(parser)
    loss.add_argument("--plan", type=Path, help="says which channels are shared (default: STUDENT.plan.json)")
    run = parser.add_argument_group("the run")
    run.add_argument("--checkpoint", type=Path, help="default: OUTPUT.checkpoint, removed at the end")
    run.add_argument("--checkpoint-seconds", type=_not_negative, default=300.0, help="between two (default: 300)")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    run.add_argument("--log", type=Path, metavar="CSV", help="table of the losses")
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
    _add_evaluation(parser)
    _add_recipe(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run=_distill)


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser("compress", help="prune and distill in turns until the target is met, and prove it")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    _add_target(parser, "macs", 0.5)
    parser.add_argument("--rounds", type=_positive, default=4, help="of pruning and distilling (default: 4)")
    parser.add_argument("--data", help=f"training inputs: {_DATA}")
    _add_images(parser)
    _add_choice(parser)
    _add_keep(parser)
    parser.add_argument("--plan", type=Path, help="where the plan goes (default: OUTPUT.plan.json)")
    _add_training(parser)
    _add_comparison(parser)
    _add_evaluation(parser)
    _add_input_shape(parser)
    _add_recipe(parser)
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run=_compress)


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


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--score", choices=SCORES, default="l2", help="how channels are ranked (default: l2)")
    parser.add_argument(
        "--spread", choices=SPREADS, default="uniform", help="the same share from each group, or all channels compete"
    )
    parser.add_argument("--multiple", type=int, default=1, help="widths that remain are multiples of this")


def _add_training(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=_positive, default=10, help="passes over the data (default: 10)")
    training.add_argument("--steps", type=_positive, help="updates in all, instead of epochs")
    training.add_argument("--batch-size", type=_positive, default=64, help="samples in an update (default: 64)")
    training.add_argument("--lr", type=_above_zero, default=1e-3, help="learning rate (default: 0.001)")
    training.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default: adamw")
    training.add_argument("--warmup", type=_share, default=0.05, metavar="SHARE", help="of the steps (default: 0.05)")
    training.add_argument("--weight-decay", type=_not_negative, default=1e-4, help="of matrices (default: 0.0001)")
    training.add_argument("--clip-norm", type=_not_negative, default=1.0, help="of the gradient; 0: any (default: 1)")
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
    training.add_argument("--mixed-precision", action="store_true", help="bfloat16 where that is safe, on a GPU")


def _add_comparison(parser: argparse.ArgumentParser) -> Any:
    loss = parser.add_argument_group("what is compared")
    loss.add_argument("--temperature", type=_above_zero, default=4.0, help="softens scores (default: 4)")
    loss.add_argument(
        "--loss",
        action="append",
        default=[],
        metavar="OUTPUT=KIND",
        help=f"one of {', '.join(_LOSSES)} (default: seen from the teacher's answers)",
    )
    loss.add_argument("--weight", action="append", default=[], metavar="OUTPUT=NUMBER", help="in the loss (default: 1)")
    loss.add_argument("--hidden", type=_natural, default=0, metavar="N", help="inner tensors compared too (default: 0)")
    loss.add_argument("--hidden-weight", type=_not_negative, default=1.0, help="of these in the loss (default: 1)")
    loss.add_argument(
        "--label-weight",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="of labels in the loss (default: 0, none needed)",
    )
    loss.add_argument("--ignore-label", type=int, default=IGNORED, help=f"of what does not count (default: {IGNORED})")
    return loss


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", type=Path, help="take options from this file, as it is written to OUTPUT.recipe.toml"
    )
    parser.set_defaults(command=parser)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval", metavar="DATA", help="measure the models on this data")
    parser.add_argument(
        "--metric", default="top1", help=f"one of {', '.join(METRICS)} or module:function (default: top1)"
    )


_TRAINING = (
    "epochs", "steps", "batch_size", "lr", "optimizer", "warmup", "weight_decay", "clip_norm", "ema", "temperature",
    "label_weight", "ignore_label", "hidden", "hidden_weight", "batch_norm", "flip", "shift", "seed", "threads",
    "device", "mixed_precision",
)  # fmt: skip  # names of options, and of the fields that they go to


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="comb, prune, distill and verify the embedded example")
    parser.add_argument("--out", type=Path, help="folder for the files that it makes (default: none are kept)")
    _add_target(parser, *demo.TARGET)
    parser.add_argument("--epochs", type=_positive, default=demo.EPOCHS, help=f"of training (default: {demo.EPOCHS})")
    parser.add_argument("--seed", type=_natural, default=0, help="of the random choice and of training")
    _add_json(parser)
    _add_force(parser)
    parser.set_defaults(run=_demo)


def _add_operators(commands: Any) -> None:
    parser = commands.add_parser("operators", help="list the operators that channels are followed through")
    parser.add_argument("--missing", action="store_true", help="the standard operators that they are not")
    parser.set_defaults(run=_operators)


_DATA = ".npz, folder of images or module:function"


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


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")


def _add_force(parser: argparse.ArgumentParser, what: str = "overwrite files that exist") -> None:
    parser.add_argument("--force", action="store_true", help=what)


def _target(text: str) -> tuple[str, float]:
    kind, _, fraction = text.partition("=")
    try:
        return kind, float(fraction)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=FRACTION, as in macs=0.5") from error


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.replace("x", ",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:SIZE,SIZE,…") from error
    if not name or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:SIZE,SIZE,… with sizes above 0")
    return name, shape


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


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
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


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


# What the commands do.


def _inspect(options: argparse.Namespace) -> None:
    _require_outputs(options, reads=[options.model])
    combed = comb(_read(options.model, options.input_shape), dict(options.input_shape))
    content = report.inspection(combed, sorted(held_groups(combed, options.keep)))
    if _write_json(options, content):
        return
    out.print(f"{options.model.name}: {report.costs_line(content['costs'])}", soft_wrap=True)
    out.print(report.groups_table(content))
    out.print(report.kept_table(content["kept"]))
    out.print(f"{100 * content['prunable_fraction']:.1f} % of the weights lie on a prunable axis")
    for operator, node in content["without_rule"].items():
        out.print(f"no rule for {operator} (at {node}): its channels are kept", soft_wrap=True)


def _prune(options: argparse.Namespace) -> None:
    plan_path = options.plan or _beside(options.output)
    _require_outputs(options, options.output, plan_path, reads=[options.model])
    kind, fraction = options.target
    Budget(kind, fraction, options.spread, options.multiple)
    started = time.perf_counter()
    model = _read(options.model, options.input_shape)
    for path in model.files(options.output):
        require_free(path, overwrite=options.force)
    wish = {kind: fraction, "spread": options.spread, "multiple": options.multiple, "keep": tuple(options.keep)}
    steps: list[pipeline.Pass] = [Fold(), Comb(), Score(options.score, options.seed)]
    steps += [pipeline.make("allocate", wish), Prune()]
    steps += [] if options.no_verify else [Verify()]
    with _progress() as progress:
        task = progress.add_task("read", total=None)
        state = pipeline.run(
            steps,
            model,
            data=_source(options.data, model, options),
            input_shapes=dict(options.input_shape),
            observer=lambda name, when: progress.update(task, description=name),
        )
    before = report.size_of(model, options.model)
    plan = state.need("plan", "prune")
    _write_both(state.model, plan, (options.output, plan_path), overwrite=options.force)
    content = report.result(state, time.perf_counter() - started)
    content |= {"output": str(options.output), "plan": str(plan_path)}
    content["bytes"] = {"before": before, "after": report.size_of(state.model, options.output)}
    if not _write_json(options, content):
        _print_pruned(content)


def _print_pruned(content: dict[str, Any]) -> None:
    out.print(report.costs_table(content))
    if any(entry["weights"] for entry in content["kept"]):
        out.print(report.kept_table(content["kept"], limit=_KEPT_REASONS))
    out.print(
        f"{content['groups_pruned']} of {content['groups']} groups pruned, {len(content['edits'])} edits, "
        f"{content['seconds']:.1f} s"
    )
    for note in content["notes"]:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(report.proof_line(content["verification"]), soft_wrap=True)
    out.print(f"wrote {content['output']} and {content['plan']}", soft_wrap=True)


def _verify(options: argparse.Namespace) -> None:
    plan = options.plan or _beside(options.pruned)
    _require_outputs(options, reads=[options.original, options.pruned, plan])
    original = load(options.original)
    source = _source(options.data, original, options)
    feeds = None if source is None else data_feeds(original, source, _VERIFY_BATCHES)
    found = verify_files(original, load(options.pruned), load_plan(plan), feeds)
    content = {"is_replay": found.is_replay, "trained": list(found.trained), **report.comparison(found.comparison)}
    if _write_json(options, content):
        return
    if found.is_replay:
        out.print("the file is, byte for byte, what the plan makes of the original", soft_wrap=True)
    else:
        out.print(
            "structure proven: the file is what the plan makes of the original; "
            f"weights whose values were trained since: {len(found.trained)}",
            soft_wrap=True,
        )
    out.print(report.proof_line(content), soft_wrap=True)


def _apply(options: argparse.Namespace) -> None:
    _require_outputs(options, options.output, reads=[options.model, options.plan])
    pruned = apply(load(options.model), load_plan(options.plan))
    pruned.model.save(options.output, overwrite=options.force)
    out.print(f"wrote {options.output}", soft_wrap=True)


def _distill(options: argparse.Namespace) -> None:
    _require_outputs(options, options.output, _recipe_path(options), reads=[options.teacher, options.student])
    distill = _distill_module()
    check_metric(options.metric)
    models = {"teacher": load(options.teacher), "student": load(options.student)}
    for path in models["student"].files(options.output):
        require_free(path, overwrite=options.force)
    source = _required_source(models["student"], options)
    settings = distill.DistillOptions(**_training(options))
    overlap = _overlap(options, models["teacher"])
    checkpoint = options.checkpoint or Path(f"{options.output}.checkpoint")
    if checkpoint.exists() and not (options.resume or options.force):
        raise CpdError(f"{checkpoint} holds an unfinished run: go on with --resume, or start anew with --force")
    traces = distill.Traces(checkpoint, options.checkpoint_seconds, options.resume, options.log, options.tensorboard)
    watched = _source(options.watch, models["student"], options)
    accuracies = _evaluated(options, models, models["teacher"]) if is_first_process() else {}
    teacher, student = (model.complete_proto() for model in models.values())
    with _progress(BarColumn()) as progress:
        task = progress.add_task("distill", total=None, visible=is_first_process())
        result = distill.distill(
            teacher,
            student,
            source,
            settings,
            lambda now: progress.update(
                task,
                total=now.steps,
                completed=now.step,
                description=f"distill, step {now.step} of {now.steps}, loss {now.loss:.4f}",
            ),
            overlap=overlap,
            watched=watched and distill.Watched(watched, options.metric, options.watch_every, options.patience),
            traces=traces,
        )
    if not is_first_process():
        return
    made = distill.trained(models["student"], result)
    accuracies |= _evaluated(options, {"distilled": made}, models["teacher"])
    made.save(options.output, overwrite=options.force)
    recipe.write(_recipe_path(options), options, overwrite=options.force)
    checkpoint.unlink(missing_ok=True)
    content = distill.summary(result) | {"output": str(options.output)}
    content |= {"metric": options.metric, **accuracies} if accuracies else {}
    if not _write_json(options, content):
        _print_distilled(content)


def _compress(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    plan_path = options.plan or _beside(options.output)
    _require_outputs(options, options.output, plan_path, _recipe_path(options), reads=[options.model])
    check_metric(options.metric)
    _distill_module()
    from cpd_onnx.passes.interleave import Interleave

    model = load(options.model)
    for path in model.files(options.output):
        require_free(path, overwrite=options.force)
    kind, fraction = options.target
    chosen = {name: getattr(options, name) for name in ("spread", "multiple", "score", "rounds")}
    step = Interleave(**_training(options), **chosen, keep=tuple(options.keep), **{kind: fraction})
    state = State(model, model, dict(options.input_shape), _required_source(model, options))
    rounds: list[dict[str, Any]] = []
    with _progress(BarColumn()) as progress:
        task = progress.add_task("comb", total=None)
        state = step.run(
            state,
            lambda number, result: rounds.append({"round": number, "seconds": round(result.seconds, 2)}),
            lambda now: progress.update(
                task,
                total=now.steps,
                completed=now.step,
                description=f"round {len(rounds) + 1} of {step.rounds}, step {now.step}, loss {now.loss:.4f}",
            ),
        )
    plan = state.need("plan", "interleave")
    found = verify_files(model, state.model, plan)
    _write_both(state.model, plan, (options.output, plan_path), overwrite=options.force)
    recipe.write(_recipe_path(options), options, overwrite=options.force)
    state = replace(state, verification=found.comparison)
    content = report.result(state, time.perf_counter() - started)
    content |= {"output": str(options.output), "plan": str(plan_path), "training": state.distilled, "rounds": rounds}
    content["bytes"] = {"before": report.size_of(model, options.model)}
    content["bytes"]["after"] = report.size_of(state.model, options.output)
    accuracies = _evaluated(options, {"original": model, "compressed": state.model}, model)
    content |= {"metric": options.metric, **accuracies} if accuracies else {}
    if not _write_json(options, content):
        _print_pruned(content)
        for name, value in accuracies.items():
            out.print(f"{name} {options.metric} {value:.4f}")


def _training(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `DistillOptions` that the command line gives."""
    return {name: getattr(options, name) for name in _TRAINING} | {
        "freeze": tuple(options.freeze),
        "losses": dict(_pairs(options.loss, _loss_kind)),
        "output_weights": dict(_pairs(options.weight, _not_negative)),
    }


def _pairs(texts: Sequence[str], read: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """OUTPUT=VALUE options; the last = counts, names may hold others."""
    for text in texts:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise CpdError(f"{text!r} should be OUTPUT=VALUE")
        try:
            yield name, read(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise CpdError(f"{text!r}: {error}") from error


def _loss_kind(text: str) -> str:
    if text not in _LOSSES:
        raise ValueError(f"a loss is one of {', '.join(_LOSSES)}")
    return text


def _overlap(options: argparse.Namespace, teacher: Model) -> Any:
    """What both models have, from the plan beside the student; nothing where there is none and none is needed."""
    path = options.plan or _beside(options.student)
    if not path.exists() and options.plan is None and not options.hidden:
        return None
    plan = load_plan(path)
    combed = comb(teacher, plan.input_shapes)
    kept = Kept(combed.atoms)
    kept.remove(channels_of(combed, match(combed, plan)))
    return _distill_module().overlap_of(combed, kept, options.hidden)


def is_first_process() -> bool:
    """Whether this is the only process of a training run, or the first one that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _print_distilled(content: dict[str, Any]) -> None:
    values = {"steps": f"{content['steps']}, {content['seconds']:.1f} s on {content['device']}"}
    if content["steps"]:
        kinds = ", ".join(f"{name} by {kind}" for name, kind in content["losses"].items())
        values = {"loss": f"{content['first_loss']:.4f} -> {content['last_loss']:.4f} ({kinds})"} | values
    if content["restored"]:
        values["batch norms put back"] = f"{content['restored']}, and folded again"
    if content["compared"]:
        values["inner tensors compared"] = ", ".join(content["compared"])
    for name in ("teacher", "student", "distilled"):
        if name in content:
            values[f"{name} {content['metric']}"] = f"{content[name]:.4f}"
    out.print(report.values_table(values))
    out.print(f"wrote {content['output']}", soft_wrap=True)


def _distill_module() -> ModuleType:
    try:
        from cpd_onnx.passes import distill
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'") from error
    return distill


def _evaluated(options: argparse.Namespace, models: dict[str, Model], teacher: Model) -> dict[str, float]:
    """What the models score on the data for that, by name; nothing where there is no such data."""
    source = _source(options.eval, teacher, options)
    if source is None:
        return {}
    reference = teacher.complete_proto() if options.metric in OF_TWO_MODELS else None
    return {
        name: evaluate(model.complete_proto(), source, options.metric, reference=reference)
        for name, model in models.items()
    }


def _demo(options: argparse.Namespace) -> None:
    _require_outputs(options)
    kind, fraction = options.target
    with _progress() as progress:
        task = progress.add_task("", total=None)
        content = demo.run(
            demo.Settings(kind, fraction, options.epochs, options.seed),
            out=options.out,
            overwrite=options.force,
            observer=lambda what: progress.update(task, description=what),
        )
    if not _write_json(options, content):
        out.print(demo.table(content))
        for line in demo.lines(content):
            out.print(line, soft_wrap=True)


def _operators(options: argparse.Namespace) -> None:
    names = unsupported_operators() if options.missing else supported_operators()
    out.print("\n".join(names), soft_wrap=True)


# Files.


def _read(path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Model:
    """Load a model; a shape for an input that it has not is an error."""
    model = load(path)
    known = {info.name for info in model.graph.input}
    for name, _ in shapes:
        if name not in known:
            raise DataError(f"--input-shape names {name!r}, but the inputs are {', '.join(sorted(known))}")
    return model


def _source(data: str | None, model: Model, options: argparse.Namespace) -> Source | None:
    images = ImageOptions(
        options.image_mean, options.image_std, options.image_scale, options.image_order, options.image_size,
        options.image_resize,
    )  # fmt: skip  # the fields in order
    return None if data is None else open_source(data, model.proto, images)


def _required_source(model: Model, options: argparse.Namespace) -> Source:
    source = _source(options.data, model, options)
    if source is None:
        raise DataError(f"training needs inputs: give --data, {_DATA}")
    return source


def _recipe_path(options: argparse.Namespace) -> Path:
    """Where the options that made a file are put on record."""
    output: Path = options.output
    return output.with_name(f"{output.name}.recipe.toml")


def _beside(path: Path) -> Path:
    """Where the plan of a file lies."""
    return path.with_name(f"{path.name}.plan.json")


def _require_outputs(options: argparse.Namespace, *paths: Path, reads: Sequence[Path] = ()) -> None:
    """Refuse before the work starts: files that are there, folders that are not, one file for two things.

    Only the model that is written may, with --force, replace one that is read.
    """
    written = (
        [*paths, *([Path(options.json)] if options.json not in (None, "-") else [])] if "json" in options else [*paths]
    )
    for place, path in enumerate(written):
        require_free(path, overwrite=options.force)
        others = [*written[:place], *(reads if place or not paths else ())]
        if any(path.absolute() == other.absolute() for other in others):
            raise ModelError(f"{path} is named for two things: choose another name")


def _write_both(model: Model, plan: Plan, paths: tuple[Path, Path], *, overwrite: bool) -> None:
    """Write the model and its plan; if one cannot be written, the other is not left alone."""
    was_there = paths[1].exists()
    plan.save(paths[1], overwrite=overwrite)
    try:
        model.save(paths[0], overwrite=overwrite)
    except BaseException:
        if not was_there:
            paths[1].unlink(missing_ok=True)
        raise


def _write_json(options: argparse.Namespace, content: dict[str, Any]) -> bool:
    """Write the result as JSON if asked to; whether that went to standard output."""
    if not options.json:
        return False
    text = json.dumps(content, indent=1) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return True
    write_atomically(Path(options.json), text.encode())
    return False


def _progress(*columns: BarColumn) -> Progress:
    """A line on a terminal that says what is being done; nothing elsewhere."""
    shown = (SpinnerColumn(), TextColumn("{task.description}"), *columns, TimeElapsedColumn())
    return Progress(*shown, console=err, transient=True, disable=not err.is_terminal)
