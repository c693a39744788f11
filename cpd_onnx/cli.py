"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cpd_onnx import __version__, demo, pipeline, report
from cpd_onnx.cost import CostModel
from cpd_onnx.data import Source, open_source
from cpd_onnx.errors import CpdError, DataError, TargetError, UnsupportedError
from cpd_onnx.graph import Model, load, require_free, write_atomically
from cpd_onnx.kept import Kept
from cpd_onnx.passes.allocate import SPREADS, Allocate
from cpd_onnx.passes.comb import Comb, comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.prune import Prune, apply
from cpd_onnx.passes.score import SCORES, Score
from cpd_onnx.passes.verify import Verify, data_feeds, verify_files
from cpd_onnx.plan import load_plan
from cpd_onnx.rules import supported_operators

out = Console()
err = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 for what the user can act on."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except CpdError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """The `cpd-onnx` command."""
    sys.exit(main())


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
    _add_demo(commands)
    operators = commands.add_parser("operators", help="the operators that channels are followed through")
    operators.set_defaults(run=lambda options: out.print("\n".join(supported_operators()), highlight=False))
    return parser


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="show the coupled channels, and what is kept and why")
    parser.add_argument("model", type=Path)
    _shared(parser)
    parser.set_defaults(run=_inspect)


def _add_prune(commands: Any) -> None:
    parser = commands.add_parser("prune", help="remove channels, prove the result, write it and its plan")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--target",
        type=_target,
        default=("channels", 0.5),
        metavar="KIND=FRACTION",
        help="what may remain: macs=0.5, params=0.5 or channels=0.5 (the default)",
    )
    parser.add_argument("--score", choices=SCORES, default="l2", help="how channels are ranked (default: l2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random score")
    parser.add_argument(
        "--spread", choices=SPREADS, default="uniform", help="the same share from each group, or all channels compete"
    )
    parser.add_argument("--multiple", type=int, default=1, help="widths that remain are multiples of this")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="groups, weights or nodes that are not touched (* and ? allowed)",
    )
    parser.add_argument(
        "--data", help="inputs for the proof: .npz, folder of images or module:function (default: random)"
    )
    parser.add_argument("--plan", type=Path, help="where the plan goes (default: beside the output)")
    parser.add_argument("--no-verify", action="store_true", help="do not run the models to compare them")
    _shared(parser)
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.set_defaults(run=_prune)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="check a pruned file against its original and its plan")
    parser.add_argument("original", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--plan", type=Path, help="default: beside the pruned file")
    parser.add_argument("--data", help="inputs to compare on (default: random)")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")
    parser.set_defaults(run=_verify)


def _add_apply(commands: Any) -> None:
    parser = commands.add_parser("apply", help="replay a plan, bit for bit")
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--input-shape", type=_shape, action="append", default=[], metavar="NAME:1,3,224,224")
    parser.set_defaults(run=_apply)


def _add_distill(commands: Any) -> None:
    parser = commands.add_parser("distill", help="fine-tune a pruned model against its original, without labels")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", required=True, help="training inputs: .npz, folder of images or module:function")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="updates in all, instead of epochs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument(
        "--label-weight",
        type=float,
        default=0.0,
        help="share of the loss that the labels have (default: 0, none needed)",
    )
    parser.add_argument(
        "--batch-norm", choices=("frozen", "train"), default="frozen", help="whether stored statistics are trained"
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    parser.add_argument("--shift", type=int, default=0, help="move images by up to so many pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eval", metavar="DATA", help="measure teacher, student and result on this data")
    parser.add_argument("--metric", choices=("top1", "miou", "mse", "cosine"), default="top1")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.set_defaults(run=_distill)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="comb, prune, distill and verify the embedded example")
    parser.add_argument("--out", type=Path, help="folder for the files that it makes (default: none are kept)")
    parser.add_argument("--target", type=_target, default=("macs", 0.2), metavar="KIND=FRACTION")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.set_defaults(run=_demo)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")
    parser.add_argument(
        "--input-shape",
        type=_shape,
        action="append",
        default=[],
        metavar="NAME:1,3,224,224",
        help="sizes of an input that the file leaves open",
    )


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


def _read(path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Model:
    """Load a model; a shape for an input that it has not is an error."""
    model = load(path)
    known = {info.name for info in model.graph.input}
    for name, _ in shapes:
        if name not in known:
            raise DataError(f"--input-shape names {name!r}, but the inputs are {', '.join(sorted(known))}")
    return model


def _source(data: str | None, model: Model) -> Source | None:
    return None if data is None else open_source(data, model.proto)


def _inspect(options: argparse.Namespace) -> None:
    _require_json_free(options)
    combed = comb(_read(options.model, options.input_shape), dict(options.input_shape))
    content = report.inspection(combed)
    if _write_json(options, content):
        return
    out.print(f"{options.model.name}: {report.costs_line(CostModel(combed).total(Kept(combed.atoms)))}")
    out.print(report.groups_table(content))
    out.print(report.kept_table(content["frozen"]))
    out.print(f"{100 * content['prunable_fraction']:.1f} % of the weights lie on a prunable axis")
    for operator, node in content["without_rule"].items():
        out.print(f"no rule for {operator} (at {node}): its channels are kept", highlight=False)


def _prune(options: argparse.Namespace) -> None:
    plan = options.plan or options.output.with_name(options.output.name + ".plan.json")
    if options.multiple < 1:
        raise TargetError(f"--multiple {options.multiple} makes no sense: give 1 or more")
    for path in (options.output, plan):
        require_free(path, overwrite=options.force)
    _require_json_free(options)
    kind, fraction = options.target
    if kind not in ("channels", "macs", "params"):
        raise TargetError(f"no target is called {kind!r}: choose one of channels, macs, params")
    started = time.perf_counter()
    model = _read(options.model, options.input_shape)
    amount = {kind: fraction}
    allocation = Allocate(**amount, spread=options.spread, multiple=options.multiple, keep=tuple(options.keep))
    steps: list[pipeline.Pass] = [Fold(), Comb(), Score(options.score, options.seed), allocation, Prune()]
    steps += [] if options.no_verify else [Verify()]
    with _progress() as progress:
        task = progress.add_task("", total=None)
        state = pipeline.run(
            steps, model, data=_source(options.data, model), input_shapes=dict(options.input_shape),
            observer=lambda name, when: progress.update(task, description=name),
        )  # fmt: skip  # one option a line would be no clearer
    content = report.result(state, options.output, time.perf_counter() - started)
    assert state.plan is not None
    state.save(options.output, overwrite=options.force)
    state.plan.save(plan, overwrite=options.force)
    if _write_json(options, content):
        return
    out.print(report.costs_table(content))
    out.print(report.kept_table(state.plan.content["frozen"], limit=5))
    pruned = f"{content['groups_pruned']} of {content['groups']} groups pruned"
    out.print(f"{pruned}, {len(state.edits)} edits, {content['seconds']:.1f} s")
    for note in content["notes"]:
        out.print(f"note: {note}", highlight=False)
    out.print(report.proof_line(content["verification"]), highlight=False)
    out.print(f"wrote {options.output} and {plan}", highlight=False, soft_wrap=True)


def _verify(options: argparse.Namespace) -> None:
    plan = options.plan or options.pruned.with_name(options.pruned.name + ".plan.json")
    _require_json_free(options)
    original = load(options.original)
    source = _source(options.data, original)
    feeds = None if source is None else data_feeds(original, source, 2)
    found = verify_files(original, load(options.pruned), load_plan(plan), feeds)
    content = {"is_replay": found.is_replay, "trained": list(found.trained), **report.comparison(found.comparison)}
    if _write_json(options, content):
        return
    if found.is_replay:
        out.print("the file is, byte for byte, what the plan makes of the original")
    else:
        out.print(f"the file is what the plan makes of the original, with {len(found.trained)} weights trained since")
    out.print(report.proof_line(content), highlight=False)


def _apply(options: argparse.Namespace) -> None:
    require_free(options.output, overwrite=options.force)
    model = _read(options.model, options.input_shape)
    pruned = apply(model, load_plan(options.plan), dict(options.input_shape))
    pruned.model.save(options.output, overwrite=options.force)
    out.print(f"wrote {options.output}", highlight=False, soft_wrap=True)


def _distill(options: argparse.Namespace) -> None:
    require_free(options.output, overwrite=options.force)
    _require_json_free(options)
    try:
        from cpd_onnx.passes import distill
    except ImportError as error:
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'") from error
    teacher, student = load(options.teacher), load(options.student)
    source = _source(options.data, student)
    assert source is not None
    names = (
        "epochs",
        "steps",
        "batch_size",
        "lr",
        "optimizer",
        "temperature",
        "label_weight",
        "batch_norm",
        "flip",
        "shift",
        "seed",
        "device",
    )
    settings = distill.DistillOptions(**{name: getattr(options, name) for name in names})
    with _progress() as progress:
        task = progress.add_task("distill", total=None)

        def show(now: Any) -> None:
            progress.update(
                task,
                total=now.steps,
                completed=now.step,
                description=f"distill, step {now.step} of {now.steps}, loss {now.loss:.4f}",
            )

        result = distill.distill(teacher.complete_proto(), student.complete_proto(), source, settings, show)
    trained = distill.trained(student, result)
    content: dict[str, Any] = {
        "steps": len(result.losses),
        "seconds": round(result.seconds, 1),
        "device": result.device,
    }
    content |= {"first_loss": result.losses[0], "last_loss": result.losses[-1], "losses": dict(result.kinds)}
    if options.eval:
        content["metric"] = options.metric
        content |= _evaluated(options, {"teacher": teacher, "student": student, "distilled": trained})
    trained.save(options.output, overwrite=options.force)
    if not _write_json(options, content):
        for key, value in content.items():
            out.print(f"{key}: {value}", highlight=False)
        out.print(f"wrote {options.output}", highlight=False, soft_wrap=True)


def _evaluated(options: argparse.Namespace, models: dict[str, Model]) -> dict[str, float]:
    from cpd_onnx.metrics import evaluate

    teacher = models["teacher"]
    source = _source(options.eval, teacher)
    assert source is not None
    compared = options.metric in ("mse", "cosine")
    reference = teacher.complete_proto() if compared else None
    return {
        name: evaluate(m.complete_proto(), source, options.metric, reference=reference) for name, m in models.items()
    }


def _demo(options: argparse.Namespace) -> None:
    _require_json_free(options)
    kind, fraction = options.target
    with _progress() as progress:
        task = progress.add_task("", total=None)
        content = demo.run(
            kind, fraction, epochs=options.epochs, out=options.out, overwrite=options.force,
            observer=lambda what: progress.update(task, description=what),
        )  # fmt: skip  # as above
    if not _write_json(options, content):
        out.print(demo.table(content))
        for line in demo.lines(content):
            out.print(line, highlight=False, soft_wrap=True)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _require_json_free(options: argparse.Namespace) -> None:
    if options.json and options.json != "-":
        require_free(Path(options.json), overwrite=getattr(options, "force", False))


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
