"""Where users already are: one call in Python for a model in any form, onnx-ir, Olive, shells, JSON, executors."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import cpd_onnx as cpd
from cpd_onnx.cli.arguments import command_line
from cpd_onnx.cli.completion import script
from cpd_onnx.cli.main import main
from cpd_onnx.data.open import source_of
from cpd_onnx.data.sources import FunctionSource, as_batch, inputs_of, open_source, steps_per_pass
from cpd_onnx.workflow import defaults
from cpd_onnx.workflow import sweep as sweeping
from cpd_onnx.workflow.requests import SHELLS
from tests.support.digits import small_digits
from tests.support.models import from_text
from tests.support.runs import plain

ROOT = Path(__file__).parents[2]
MODELS = Path(cpd.__file__).parent / "models"
DIGITS = MODELS / "digits.onnx"
BLIND: dict[str, Any] = {"blind": True, "score": "l2", "repair": False}
"""Options of a quick run without data, as those of `plain`."""
FEW: dict[str, Any] = {"score": "l2", "repair_samples": 32, "effort": 0, "train": False}
"""Options with which a model is made from samples in no time."""
TINY = "(float[1, 4] x, float[4, 8] a, float[8, 2] b) => (float[1, 2] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(small_digits(), tmp_path / "digits.onnx")
    np.savez(tmp_path / "train.npz", **samples(96))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def samples(count: int) -> dict[str, Any]:
    return {name: array[:count] for name, array in np.load(MODELS / "digits_train.npz").items()}


def feeds(size: int = 32) -> Iterator[dict[str, Any]]:
    whole = samples(96)
    for start in range(0, 96, size):
        yield {name: array[start : start + size] for name, array in whole.items()}


def run(*arguments: object) -> int:
    return main(plain([*map(str, arguments)]))


# One call.


def test_it_does_what_the_command_does(folder: Path) -> None:
    quiet = ("--no-report", "--force")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *quiet) == 0
    assert cpd.compress("digits.onnx", macs=0.5, **BLIND).serialize() == Path("small.onnx").read_bytes()
    pytest.importorskip("torch")
    short = ("--steps", 3, "--batch-size", 32, "--threads", 1)
    few = ("--samples", 32, "--repair-samples", 32, "--keep", "head*", "--seed", 5)
    assert run("compress", "digits.onnx", "-o", "small.onnx", "--data", "train.npz", *few, *short, *quiet) == 0
    options = {"macs": 0.5, "samples": 32, "repair_samples": 32, "effort": 0, "keep": "head*", "seed": 5}
    made = cpd.compressed("digits.onnx", "train.npz", train={"steps": 3, "batch_size": 32, "threads": 1}, **options)
    assert made.state.model.serialize() == Path("small.onnx").read_bytes()
    assert made.state.plan is not None
    assert made.state.plan.dumps() == Path("small.onnx.plan.json").read_text()
    assert len(made.losses) == 3


def test_what_comes_back_is_what_was_given() -> None:
    proto = onnx.load(DIGITS)
    before = proto.SerializeToString(deterministic=True)
    made = cpd.compress(proto, params=0.4, **BLIND)
    assert isinstance(made, onnx.ModelProto)
    assert proto.SerializeToString(deterministic=True) == before
    stored = [sum(np.prod(tensor.dims) for tensor in model.graph.initializer) for model in (proto, made)]
    assert stored[1] < 0.5 * stored[0]
    graph = gs.import_onnx(proto)
    smaller = cpd.compress(graph, params=0.4, **BLIND)
    assert isinstance(smaller, gs.Graph)
    assert [node.name for node in smaller.nodes] == [node.name for node in graph.nodes]
    weights = {name: tensor.values for name, tensor in smaller.tensors().items() if isinstance(tensor, gs.Constant)}
    for tensor in made.graph.initializer:
        np.testing.assert_array_equal(weights[tensor.name], onnx.numpy_helper.to_array(tensor))
    model = cpd.load(DIGITS)
    assert isinstance(cpd.compress(model, params=0.4, **BLIND), cpd.Model)
    assert isinstance(cpd.compress(str(DIGITS), params=0.4, **BLIND), cpd.Model)
    with pytest.raises(TypeError, match=r"or an onnx_ir\.Model, got int"):
        cpd.compress(5)


def test_data_in_every_form_holds_the_same_samples(folder: Path) -> None:
    model, whole = cpd.load("digits.onnx"), list(feeds(96))
    forms: list[Any] = [
        "train.npz", Path("train.npz"), samples(96), open_source("train.npz", model.proto), whole, lambda: iter(whole),
        lambda seed: whole, [(feed["image"], feed["labels"]) for feed in whole],
    ]  # fmt: skip  # a table
    for data in forms:
        (batch,) = source_of(data, model).batches(96)
        assert {name: array.tolist() for name, array in batch.items()} == {
            name: array.tolist() for name, array in samples(96).items()
        }
    made_up = next(source_of("synthetic", model).batches(96))
    assert (made_up["image"].shape, set(made_up)) == ((96, 1, 8, 8), {"image"})
    made = cpd.compressed(model, whole, macs=0.5, **FEW)
    assert made.state.repaired is not None


def test_a_loader_of_torch_says_how_long_it_is() -> None:
    torch = pytest.importorskip("torch")
    rows = samples(96)
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(rows["image"]), torch.from_numpy(rows["labels"]))
    named = [{"image": image.requires_grad_(), "labels": label} for image, label in pairs]
    for dataset in (pairs, named):
        loader = torch.utils.data.DataLoader(dataset, batch_size=32)
        options = FEW | {"macs": 0.5, "max_loss": float("inf"), "train": {"epochs": 2, "threads": 1}}
        made = cpd.compressed(DIGITS, loader, **options)
        assert len(made.losses) == 6
    assert made.state.repaired is not None


def test_batches_in_several_forms() -> None:
    one = inputs_of(onnx.load(DIGITS))
    image, labels = np.zeros((2, 1, 8, 8), np.float32), np.arange(2)
    assert set(as_batch(image, one)) == {"image"}
    for given in ((image, labels), [image, labels], ({"image": image}, labels)):
        assert as_batch(given, one)["labels"] is labels
    for wrong in ((image, labels, labels), [image, image, image]):
        with pytest.raises(cpd.DataError, match="yield dictionaries with arrays for 'image'"):
            as_batch(wrong, one)
    with pytest.raises(
        cpd.DataError, match="the data yields a ndarray: yield dictionaries with arrays for 'image', 'image'"
    ):
        as_batch(image, one * 2)
    assert steps_per_pass(FunctionSource(feeds, one), 16) is None
    assert steps_per_pass(source_of(list(feeds()), cpd.load(DIGITS)), 16) == 3


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(cpd.DataError, match="iterated only once: give a list, or a function"):
        cpd.compress(DIGITS, feeds())
    with pytest.raises(TypeError, match="feeds or a function, got int"):
        cpd.compress(DIGITS, 5)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(cpd.DataError, match="training needs samples: give --data, or `data` in Python"):
        cpd.compress(DIGITS, train=True)
    with pytest.raises(cpd.TargetError, match="only one target is allowed"):
        cpd.compress(DIGITS, macs=0.5, params=0.5, **BLIND)
    with pytest.raises(TypeError, match=r"compress has no option 'polici' \(did you mean policy\?\)"):
        cpd.compress(DIGITS, polici="optimal")  # type: ignore[call-overload]  # that is the point
    with pytest.raises(cpd.DataError, match="the data contains 'picture'"):
        cpd.compress(DIGITS, {"picture": samples(8)["image"]})


def test_without_torch_it_is_repaired_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "can_train", lambda: False)
    made = cpd.compressed(DIGITS, samples(32), macs=0.5, **FEW | {"train": None})
    assert (made.losses, made.state.distilled, made.state.repaired is None) == ((), None, False)
    with pytest.raises(cpd.UnsupportedError, match="needs torch"):
        cpd.compress(DIGITS, samples(32), **FEW | {"train": True})


def test_the_package_stays_small_until_it_is_asked_for() -> None:
    code = (
        "import sys, cpd_onnx as cpd; assert 'compress' in dir(cpd); print('cpd_onnx.passes' in sys.modules);"
        "from cpd_onnx import compress; print('cpd_onnx.passes' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
    with pytest.raises(AttributeError, match="has no attribute 'expand'"):
        _ = cpd.expand


# onnx-ir.


def test_models_of_onnx_ir(tmp_path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    onnx.save(
        onnx.load(DIGITS), tmp_path / "apart.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    model = ir.load(tmp_path / "apart.onnx")
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    made = cpd.compress(model, macs=0.5, **BLIND)
    assert isinstance(made, ir.Model)
    proto = ir.to_proto(made)
    wanted = cpd.compress(onnx.load(DIGITS), macs=0.5, **BLIND)
    assert proto.graph.node == wanted.graph.node
    assert [list(tensor.dims) for tensor in proto.graph.initializer] == [
        list(tensor.dims) for tensor in wanted.graph.initializer
    ]
    assert all(model.graph.initializers[name].const_value is value for name, value in before.items())


def test_a_pass_of_onnx_ir() -> None:
    ir = pytest.importorskip("onnx_ir")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, TopologicalSortPass

    from cpd_onnx.integrations.onnx_ir import CompressPass

    model, told = ir.load(DIGITS), []
    sizes = {name: value.shape for name, value in model.graph.initializers.items()}
    several = ir.passes.Sequential(
        TopologicalSortPass(),
        CompressPass(samples(32), macs=0.4, observer=told.append, **FEW),
        ClearMetadataAndDocStringPass(),
    )
    result = several(model)
    assert (result.modified, result.model is model) == (True, False)
    assert {name: value.shape for name, value in model.graph.initializers.items()} == sizes
    (made,) = told
    assert made.state.allocation.after.macs < 0.45 * made.state.allocation.before.macs
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert not CompressPass(macs=1.0, **BLIND)(model).modified
    with pytest.raises(ir.passes.PassError) as raised:
        ir.passes.Sequential(CompressPass(macs=5, **BLIND))(model)
    assert isinstance(raised.value.__cause__, cpd.TargetError)


# Olive.

WORKFLOW = """
import json, sys
import numpy as np
from olive.data.registry import Registry
from olive.workflows import run

from cpd_onnx.integrations.olive import package_config

@Registry.register_dataset(name="digits")
def digits(**_):
    with np.load("train.npz") as stored:
        images, labels = stored["image"], stored["labels"]
    return [({"image": image}, label) for image, label in zip(images, labels)]

if __name__ == "__main__":
    run(json.load(sys.stdin), package_config=package_config())
"""


def olive(folder: Path, **passes: Any) -> subprocess.CompletedProcess[str]:
    """Run a workflow of Olive on the example, in a process of its own, whose report to its makers is switched off."""
    pytest.importorskip("olive")
    (folder / "workflow.py").write_text(WORKFLOW)
    data = {"name": "few", "load_dataset_config": {"type": "digits"}}
    content = {
        "input_model": {"type": "ONNXModel", "model_path": "digits.onnx"},
        "data_configs": [data | {"dataloader_config": {"params": {"batch_size": 32}}}],
        "passes": passes,
        "cache_dir": "cache",
        "output_dir": "out",
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CI": "true"}
    return subprocess.run(
        [sys.executable, "workflow.py"],
        input=json.dumps(content), capture_output=True, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip  # what and how


def test_a_workflow_of_olive(folder: Path) -> None:
    prune = {"type": "CpdCompress", "target": "params=0.4", "data_config": "few", **FEW}
    done = olive(folder, prune=prune, quantize={"type": "OnnxStaticQuantization", "data_config": "few"})
    assert done.returncode == 0, done.stderr
    with np.load("train.npz") as stored:
        wanted = cpd.compressed("digits.onnx", {"image": stored["image"]}, params=0.4, **FEW)
    assert wanted.state.plan is not None
    (plan,) = Path("out").glob("digits-*.onnx.plan.json")
    assert cpd.load_plan(plan).removed == wanted.state.plan.removed
    made = onnx.load("out/model.onnx")
    widths = {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}
    small = {tensor.name: list(tensor.dims) for tensor in wanted.state.model.graph.initializer}
    kept = [name for name in small if widths.get(f"{name}_quantized") == small[name]]
    assert len(kept) > 10
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in made.graph.initializer}


def test_a_workflow_of_olive_without_data(folder: Path) -> None:
    half = {"type": "OnnxFloatToFloat16"}
    done = olive(
        folder,
        prune={"type": "CpdCompress", "target": "macs=0.5", "blind": True},
        half=half,
        add={"type": "AddOliveMetadata", "graph_name": "digits"},
    )
    assert done.returncode == 0, done.stderr
    wanted = cpd.compress(onnx.load("digits.onnx"), macs=0.5, blind=True)
    made = onnx.load("out/model.onnx")
    assert [list(tensor.dims) for tensor in made.graph.initializer] == [
        list(tensor.dims) for tensor in wanted.graph.initializer
    ]
    assert made.graph.initializer[0].data_type == onnx.TensorProto.FLOAT16
    done = olive(folder, prune={"type": "CpdCompress", "target": "speed=2"})
    assert "target 'speed=2' is not KIND=AMOUNT with one of channels, macs" in done.stdout


# Shells.


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    text = capsys.readouterr().out
    assert (text, "compress" in text) == (script(shell), True)
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("comple", {"completion"}),
        ("prune digits.onnx --pol", {"--policy"}),
        ("prune digits.onnx --policy o", {"optimal"}),
        ("inspect dig", {"digits.onnx"}),
        ("compress digits.onnx --data tr", {"train.npz"}),
        ("sweep digits.onnx -o s", {"some"}),
        ("compress digits.onnx --score re", {"reconstruction"}),
        ("compress digits.onnx --metric mi", {"miou"}),
        ("deploy digits.onnx --profile avx5", {"avx512"}),
        ("compress digits.onnx --target ma", {"macs=0.5"}),
        ("compress digits.onnx -o small.onnx --cost-table t", {"table.json"}),
        ("completion f", {"fish"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(folder: Path, words: str, completed: set[str]) -> None:
    (folder / "some").mkdir()
    (folder / "some.onnx").touch()
    (folder / "table.json").touch()
    asked = f"""{script("bash")}
    COMP_WORDS=(cpd-onnx {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="${{COMP_WORDS[*]}}"
    $(complete -p cpd-onnx | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, cwd=folder)
    assert (set(done.stdout.split()), done.stderr) == (completed, "")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("comple", {"completion"}),
        ("prune digits.onnx --pol", {"--policy"}),
        ("prune digits.onnx --policy o", {"optimal"}),
        ("compress digits.onnx --score re", {"reconstruction"}),
        ("compress digits.onnx --target ma", {"macs=0.5"}),
        ("deploy digits.onnx --profile avx5", {"avx512"}),
        ("inspect dig", {"digits.onnx"}),
        ("compress digits.onnx --data t", {"train.npz"}),
        ("sweep digits.onnx -o s", {"some/"}),
    ],
)
@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes(folder: Path, words: str, completed: set[str]) -> None:
    (folder / "some").mkdir()
    (folder / "table.json").touch()
    program = folder / "bin" / "cpd-onnx"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (folder / "script.fish").write_text(script("fish"))
    asked = f"source script.fish; complete -C 'cpd-onnx {words}'"
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(folder)}
    line = ["fish", "--no-config", "-c", asked]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    assert {line.partition("\t")[0] for line in done.stdout.splitlines()} == completed


@pytest.mark.parametrize("shell", SHELLS)
def test_suggested_values_are_those_of_the_options(shell: str) -> None:
    text = script(shell)
    for value in ("reconstruction", "miou", "avx512", "latency=0.5", "fish", "quiet"):
        assert value in text, value


# JSON.


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (action.choices for action in command_line()._actions if isinstance(action.choices, dict))
    return choices


def test_every_command_speaks_json() -> None:
    silent = [name for name, parser in commands().items() if "--json" not in parser.format_help()]
    assert silent == ["completion"]


LINES = {
    "inspect": ("digits.onnx",),
    "prune": ("digits.onnx", "-o", "out.onnx"),
    "verify": ("digits.onnx", "pruned.onnx"),
    "apply": ("digits.onnx", "pruned.onnx.plan.json", "-o", "out.onnx"),
    "audit": ("pruned.onnx", "-o", "audit"),
    "compress": ("digits.onnx", "-o", "out.onnx", "--no-report"),
    "sweep": ("digits.onnx", "-o", "out", "--targets", "macs=0.5", "--executor", "concurrent.futures:ThreadPoolExecutor"),
    "bench": ("digits.onnx", "--seconds", "0.1"),
    "deploy": ("digits.onnx", "-o", "out.onnx", "--batch", 1),
    "latency": ("tiny.onnx", "-o", "out.json"),
    "operators": ("--missing",),
}  # fmt: skip  # a table
TRAINS = {
    "distill": ("digits.onnx", "pruned.onnx", "-o", "out.onnx", "--data", "train.npz", "--steps", "1"),
}


ELSEWHERE = {"demo", "reproduce"}
"""Long ones, whose tests in test_cli.py and test_compress.py read their JSON."""


@pytest.mark.parametrize("command", sorted({*commands()} - ELSEWHERE - {"completion"}))
def test_json_and_nothing_else(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command in TRAINS:
        pytest.importorskip("torch")
    if command == "audit":
        pytest.importorskip("fpdf")
    monkeypatch.setattr(sweeping, "_SECONDS", 0.05)
    if {"pruned.onnx", "pruned.onnx.plan.json"} & {*(LINES | TRAINS)[command]}:
        maker = ("compress", "--no-report") if command == "audit" else ("prune",)
        assert run(*maker, "digits.onnx", "-o", "pruned.onnx") == 0
    onnx.save(from_text(TINY), "tiny.onnx")
    capsys.readouterr()
    assert run(command, *(LINES | TRAINS)[command], "--json", "-") == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_what_the_json_of_small_commands_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "digits.onnx", "-o", "pruned.onnx", "--json", "pruned.json") == 0
    assert run("apply", "digits.onnx", "pruned.onnx.plan.json", "-o", "again.onnx", "--json", "again.json") == 0
    first, again = (json.loads(Path(f"{name}.json").read_text()) for name in ("pruned", "again"))
    assert (again["edits"], again["bytes"]) == (len(first["edits"]), first["bytes"])
    capsys.readouterr()
    assert run("operators", "--json", "operators.json") == 0
    assert json.loads(Path("operators.json").read_text())["operators"] == capsys.readouterr().out.split()
    assert run("operators", "--json", "operators.json") == 1
    assert "exists: choose another name" in capsys.readouterr().err


# Executors.


EXECUTORS = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

def processes():
    return ProcessPoolExecutor(2, get_context("spawn"))

def cluster():
    from distributed import Client, LocalCluster
    here = LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None)
    return Client(here).get_executor()

def nothing():
    return 5
"""


@pytest.fixture
def executors(folder: Path) -> dict[str, str]:
    """The environment in which `--executor executors:NAME` is found, by other processes too."""
    (folder / "executors.py").write_text(EXECUTORS)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


SWEEP = "import sys, cpd_onnx.workflow.sweep as sweep; from cpd_onnx.cli.main import main; sweep._SECONDS = 0.05; sys.exit(main())"
"""The command, which times models no longer than that."""


def sweep(environment: dict[str, str], executor: str) -> subprocess.CompletedProcess[str]:
    line = ["sweep", "digits.onnx", "-o", executor, "--targets", "macs=0.7,0.5", "--executor", f"executors:{executor}"]
    line += ["--log-level", "quiet"]
    return subprocess.run(
        [sys.executable, "-c", SWEEP, *plain(line)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("executor", ["processes", "cluster"])
def test_other_processes_make_the_models_of_a_sweep(executors: dict[str, str], executor: str) -> None:
    if executor == "cluster":
        pytest.importorskip("distributed")
    done = sweep(executors, executor)
    assert (done.returncode, done.stderr) == (0, "")
    for target in (0.7, 0.5):
        made = onnx.load(f"{executor}/macs={target}.onnx")
        wanted = cpd.compress(onnx.load("digits.onnx"), macs=target, **BLIND)
        assert (made.graph.node, made.graph.initializer) == (wanted.graph.node, wanted.graph.initializer)


def test_something_else_than_an_executor(executors: dict[str, str]) -> None:
    done = sweep(executors, "nothing")
    assert (done.returncode, done.stderr) == (
        1,
        "error: --executor executors:nothing returned a int, not a concurrent.futures.Executor\n",
    )
