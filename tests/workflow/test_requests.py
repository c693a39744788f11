"""Requests: what is made of their fields, and that a run appears whole or not at all."""

from __future__ import annotations

import ast
import inspect
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.budget.targets import KINDS, parse
from cpd_onnx.cli import reference
from cpd_onnx.cli.arguments import command_line, request_of
from cpd_onnx.cli.main import main
from cpd_onnx.io.files import content_of
from cpd_onnx.options import build, options_of, values_of
from cpd_onnx.passes.allocate import AllocateOptions
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.api import CompressOptions, run
from cpd_onnx.workflow.requests import COMMANDS, Compress, Deploy, Prune, Sweep
from tests.support.digits import MODELS, small_digits
from tests.support.runs import plain

ROOT = Path(__file__).parents[2]
QUICK = ("--no-report", "--no-distill", "--samples", "32", "--repair-samples", "32")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(small_digits(), tmp_path / "model.onnx")
    with np.load(MODELS / "digits_train.npz") as arrays:
        np.savez(tmp_path / "data.npz", **{name: array[:64] for name, array in arrays.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: object) -> int:
    return main(plain([*map(str, arguments)]))


def typed(*arguments: object) -> Any:
    return request_of(command_line().parse_args([*map(str, arguments)]))


# What is made of the fields.

EXAMPLES = {
    "natural": "7", "positive": "7", "integer": "-7", "loss_bound": "0.25", "above_zero": "0.5", "not_negative": "0.5", "ratio": "0.5",
    "share": "0.5", "_bits": "4",
    "int": "7", "str": "some", "Path": "some.file", "file": "some.onnx", "bounds": "head*=0.25..1", "target": "macs=0.7",
    "targets": "macs=0.7,0.4", "parse": "latency=5ms,flash=0.5", "steps": "auto16", "input_shape": "image:2,1,8,8", "height_width": "5,7",
}  # fmt: skip  # a table
OF_NAMES = {
    "image_mean": "0.5,0.25,0.5", "image_std": "0.5", "losses": "scores=mse", "output_weights": "scores=0.5",
    "ratios": "0.5,0.25", "batch": "1,8", "threads": "1,2", "provider": "CUDAExecutionProvider",
    "latency_provider": "CUDAExecutionProvider", "fix": "image=2,1,8,8",
}  # fmt: skip  # a table


def example(named: Any) -> str:
    """Another value than the default, as it is typed."""
    if named.option.choices:
        return str(next(choice for choice in named.option.choices if choice != named.default))
    name = getattr(named.option.read, "__name__", "")
    return EXAMPLES[name] if name in EXAMPLES else OF_NAMES[named.name]


def everything(owner: type) -> list[str]:
    """A command line with every option of a request, none at its default."""
    words: list[str] = []
    for named in options_of(owner):
        if named.is_positional:
            words.append(example(named))
        elif named.name != "recipe":
            is_on = named.default is not True
            switch = f"--{named.key}" if is_on else f"--no-{named.key}"
            words += [switch] if named.is_switch else [f"--{named.key}", example(named)]
    return words


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_can_be_typed_pickled_and_repeated(name: str) -> None:
    owner = COMMANDS[name]
    request = typed(name, *everything(owner))
    assert type(request) is owner
    assert pickle.loads(pickle.dumps(request)) == request
    assert build(owner, values_of(request)) == request
    for named in options_of(owner):
        if named.name != "recipe":
            assert values_of(request)[named.name] != named.default, named.name
    if name not in ("prune", "compress", "distill", "deploy"):
        return  # whose options are put on record, or could be
    text = recipe.text(request, folder=Path())
    said = recipe.parsed(text, owner, Path("here.toml"))
    wanted = {named.name for named in options_of(owner) if named.option.is_recorded}
    assert {key: str(value) for key, value in said.items() if key in wanted} == {
        key: str(values_of(request)[key]) for key in wanted
    }


OLD = """made_by = "cpd-onnx 1.0.0"
weights = "as-is"
target = "macs=0.5"
rounds = 2
data = "data.npz"
allow-inconclusive = false
image-mean = "0.5,0.4,0.3"
image-std = "1.0"
image-scale = 0.00392156862745098
image-order = "RGB"
samples = 32
score-labels = false
min-ratio = 0.25
max-ratio = 1.0
width = ["head*=0.5..1.0"]
distill = false
latency-threads = 1
latency-provider = "CPUExecutionProvider"
keep = ["head*"]
epochs = 10
steps = 4
freeze = []
loss = ["scores=mse"]
weight = []
batch-norm = "auto"
metric = "top1"
input-shape = ["image:1,1,8,8"]
report = false
checkpoint-seconds = 300.0
watch-every = 100
patience = 0
"""
"""A recipe as the command line wrote it before it was made of requests."""


def test_a_recipe_of_an_earlier_version_is_read(folder: Path) -> None:
    Path("old.toml").write_text(OLD)
    request = typed("compress", "model.onnx", "-o", "small.onnx", "--recipe", "old.toml", "--keep", "stem*")
    assert request.data == str(folder / "data.npz")
    assert (request.target, request.rounds, request.images.mean) == (parse("macs=0.5"), 2, (0.5, 0.4, 0.3))
    assert (request.widths, request.losses) == ((("head*", (0.5, 1.0)),), {"scores": "mse"})
    assert (request.input_shapes, request.report) == ({"image": (1, 1, 8, 8)}, False)
    assert request.keep == ("head*", "stem*")
    assert typed("compress", "model.onnx", "-o", "small.onnx", "--recipe", "old.toml", "--rounds", "1").rounds == 1


def test_an_unknown_name_brings_those_that_are_like_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"compress has no option 'roundto' \(did you mean round_to or rounds\?\)"):
        cpd.compress("model.onnx", **{"roundto": 8})
    with pytest.raises(ValueError, match=r"'allocate' has no option 'mac' \(did you mean macs\?\)"):
        cpd.run("comb, score, allocate{mac=0.5}", "model.onnx")
    Path("r.toml").write_text("epoch = 1\n")
    assert command("compress", "model.onnx", "-o", "small.onnx", "--recipe", "r.toml") == 1
    assert "no option 'epoch' (did you mean epochs?)" in capsys.readouterr().err


def test_the_signature_says_what_can_be_said() -> None:
    parameters = inspect.signature(cpd.compress).parameters
    assert list(parameters)[:2] == ["model", "data"]
    assert {*parameters} == {"model", *(field.name for field in fields(CompressOptions))}
    assert parameters["repair_samples"].default == 512
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())


def test_an_option_of_allocation_is_one_of_every_command_that_chooses() -> None:
    """It is enough to write the field."""
    wanted = {field.name for field in fields(AllocateOptions)}
    for owner in (Prune, Compress, Sweep, CompressOptions):
        assert wanted <= {named.name for named in options_of(owner)}, owner


def test_the_page_of_options_is_made_of_them() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == reference.updated(page), "python -m cpd_onnx.cli.reference docs/options.md"
    assert [named.key for named in options_of(AllocateOptions) if f"| `--{named.key}` |" not in page] == []


# Defaults.


def _stated() -> Iterator[tuple[str, str, str]]:
    """Fields of options whose default is written down: class, name and value."""
    folders = (
        ROOT / "passes",
        ROOT / "cpd_onnx" / "workflow",
        ROOT / "cpd_onnx" / "training",
        ROOT / "cpd_onnx" / "cli",
    )
    for path in (path for folder in folders for path in folder.glob("*.py")):
        for owner in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            for entry in owner.body:
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.value, ast.Call) and entry.value.args:
                    first = ast.unparse(entry.value.args[0])
                    if isinstance(entry.value.func, ast.Name) and entry.value.func.id in (
                        "option",
                        "_training",
                        "_run",
                    ):
                        yield owner.name, ast.unparse(entry.target), first


def test_no_default_is_stated_twice() -> None:
    """A field says its own, or takes it `again` from where it is said; what is nothing, empty or zero says nothing."""
    found: dict[tuple[str, str], list[str]] = {}
    for owner, name, value in _stated():
        if value not in ("None", "False", "()", "{}", "MISSING", "0"):
            found.setdefault((name, value), []).append(owner)
    assert len(found) > 20
    assert {key: owners for key, owners in found.items() if len(owners) > 1} == {}
    for owner in COMMANDS.values():
        for named in options_of(owner):
            is_said = re.search(r"\(default: [\d.]", named.option.help)
            assert named.default is None or named.option.is_many or not is_said or named.name == "image_scale"


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (("--score", "l2"), "uniform"),
        (("--data", "data.npz"), "optimal"),
        (("--data", "data.npz", "--score", "l2"), "optimal"),
        (("--data", "data.npz", "--policy", "global"), "global"),
    ],
)
def test_one_rule_says_what_the_allocation_policy_is(folder: Path, options: tuple[str, ...], policy: str) -> None:
    few = ("--samples", 16, "--repair-samples", 16, "--effort", 0)
    few += ("--target", "macs=0.5", "--max-loss", "inf", "--no-check-speed")
    assert command("prune", "model.onnx", "-o", "once.onnx", *options, *few) == 0
    assert command("prune", "model.onnx", "-o", "twice.onnx", *options, *few, "--rounds", 2) == 0
    for name in ("once", "twice"):
        assert json.loads(Path(f"{name}.onnx.plan.json").read_text())["budget"]["policy"] == policy
    named = {"data": "data.npz"} if "--data" in options else {}
    score = "l2" if "l2" in options else None
    chosen = "global" if "global" in options else None
    more = named or {"blind": True}
    made = cpd.compressed(
        "model.onnx", score=score, policy=chosen, macs=0.5, max_loss=float("inf"), train=False, samples=16,
        repair_samples=16, effort=0, **more,
    )  # fmt: skip  # what and how
    assert made.state.need("plan", "prune").content["budget"]["policy"] == policy


# What is given.


def test_data_of_a_pipeline_may_be_whatever_compress_takes(folder: Path) -> None:
    passes = "comb, score{kind='activation', samples=64}, allocate{macs=0.5}, prune, verify"
    with np.load("data.npz") as arrays:
        held = dict(arrays)
    forms: list[Any] = ["data.npz", Path("data.npz"), held, [held], lambda: iter([held])]
    made = [cpd.run(passes, "model.onnx", data=data) for data in forms]
    assert len({state.model.serialize() for state in made}) == 1
    state = cpd.run("score{kind='activation', samples=32}", cpd.run("comb", "model.onnx"), data="data.npz")
    assert state.scores is not None
    with pytest.raises(cpd.DataError, match="the data contains 'picture'"):
        cpd.run(passes, "model.onnx", data={"picture": held["image"]})


def test_a_model_of_a_framework_is_told_how_it_becomes_onnx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = type("Sequential", (), {"__module__": "keras.src.models.sequential"})()
    with pytest.raises(
        cpd.UnsupportedError, match=r"a Sequential is a model of keras, not ONNX: export it first, model\.ex"
    ):
        cpd.compress(made)
    torch = pytest.importorskip("torch")
    with pytest.raises(cpd.UnsupportedError, match=r"a Linear is a model of torch, not ONNX: .*torch\.onnx\.export"):
        cpd.run("comb", torch.nn.Linear(2, 2))
    torch.save({"weight": torch.zeros(3)}, "model.pt")
    assert command("inspect", "model.pt") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: model.pt is a model of torch, not ONNX: export it first")
    assert said.count("\n") == 1


def test_results_say_what_they_are_in_one_line(folder: Path) -> None:
    state = cpd.run("comb, score, allocate{macs=0.5}, prune, verify", "model.onnx")
    results = (
        state,
        state.model,
        state.plan,
        state.combed,
        state.allocation,
        state.verification,
        cpd.compressed("model.onnx", macs=0.5, blind=True),
    )
    combed = state.need("combed", "comb")
    for found in (*results, state.folded, *combed.groups, *combed.weights):
        line = repr(found)
        assert line.startswith(f"{type(found).__name__}("), line
        assert "\n" not in line
        assert len(line) < 400
    assert "proof: verified" in repr(state)


# Whole or not at all.


def there(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def failing(*_: object, **__: object) -> Any:
    raise cpd.UnsupportedError("it cannot be measured")


@pytest.mark.parametrize("place", ["sensitivity.distance", "_write_pages", "write_json", "manifest.write"])
def test_a_failing_compress_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    before = there(folder)
    request = Compress(
        model=Path("model.onnx"), output=Path("small.onnx"), data="data.npz", distill=False, report=False, samples=32,
        repair_samples=32, json="small.json", target=("macs", 0.5), check_speed=False, effort=0,
    )  # fmt: skip  # what and how
    with monkeypatch.context() as patch:
        patch.setattr(f"cpd_onnx.workflow.compress_files.{place}", failing)
        with pytest.raises(cpd.UnsupportedError):
            run(request)
    assert {name for name in there(folder) - before if "checkpoint" not in name} == set()
    assert run(replace(request, resume=True)) is not None
    ends = ("", ".plan.json", ".recipe.toml", ".manifest.json")
    assert there(folder) - before == {*(f"small.onnx{end}" for end in ends), "small.json"}


@pytest.mark.parametrize("place", ["evaluated", "report.size_of", "manifest.write", "write_json"])
def test_a_failing_deploy_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    before = there(folder)
    request = Deploy(model=Path("model.onnx"), output=Path("out.onnx"), batch=1, json="out.json")
    with monkeypatch.context() as patch:
        patch.setattr(f"cpd_onnx.workflow.deploy.{place}", failing)
        with pytest.raises(cpd.UnsupportedError):
            run(request)
    assert there(folder) == before
    run(request)
    assert there(folder) - before == {"out.onnx", "out.onnx.manifest.json", "out.json"}


def test_a_failing_sweep_leaves_whole_models_and_no_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is a run of its own, which a failing comparison of all of them does not take away."""
    monkeypatch.setattr("cpd_onnx.workflow.sweep.timed", failing)
    Path("out").mkdir()
    request = Sweep(
        model=Path("model.onnx"), output=Path("out"), targets=(("macs", 0.7), ("macs", 0.5)), json="sweep.json",
        executor="concurrent.futures:ThreadPoolExecutor", blind=True,
    )  # fmt: skip  # what and how
    with pytest.raises(cpd.UnsupportedError):
        run(request)
    made = there(folder / "out")
    for name in ("macs=0.7", "macs=0.5"):
        assert {f"{name}.onnx{end}" for end in ("", ".plan.json", ".recipe.toml", ".manifest.json")} <= made
    assert not [name for name in made if name.startswith("sweep.") and name != "sweep.recipe.toml"]
    assert not Path("sweep.json").exists()


def test_what_waits_to_appear_is_read_where_it_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names the bytes of the files that appear with it."""
    assert command("compress", "model.onnx", "-o", "small.onnx", *QUICK) == 0
    entries = json.loads(Path("small.onnx.manifest.json").read_text())["outputs"]
    assert {entry["bytes"] == content_of(Path(entry["file"])).stat().st_size for entry in entries} == {True}


def test_a_deployment_with_fixed_sizes_is_repeated(folder: Path) -> None:
    """The recipe of a manifest says sizes as they are typed."""
    assert command("deploy", "model.onnx", "-o", "out.onnx", "--fix", "image=2,1,8,8") == 0
    assert command("reproduce", "out.onnx.manifest.json", "-o", "again") == 0
    assert Path("again/out.onnx").read_bytes() == Path("out.onnx").read_bytes()


def test_requests_are_frozen_and_say_what_must_be_given() -> None:
    for owner in COMMANDS.values():
        assert is_dataclass(owner)
        assert owner.__dataclass_params__.frozen  # type: ignore[attr-defined]  # of the dataclass
    assert [named.name for named in options_of(Compress) if named.default is MISSING] == ["output", "model"]


def test_arguments_of_compress_are_options_of_the_command_but_for_those_that_integrations_replace() -> None:
    named = {named.name for named in options_of(Compress)}
    others = {field.name for field in fields(CompressOptions)} - named
    assert others == {"train", "progress", *KINDS}
    text = (ROOT / "cpd_onnx" / "integrations" / "olive.py").read_text()
    replaced = text.partition("_REPLACED = {")[2].partition("}")[0]
    assert all(f'"{name}"' in replaced for name in others - {*KINDS})
    assert "*KINDS" in replaced
