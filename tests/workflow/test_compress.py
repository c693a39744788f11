"""Everything in one go: what `compress`, `sweep` and `reproduce` leave behind, and that it can be repeated."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.errors import PlanError
from cpd_onnx.report.verdict import TARGET_MISSED
from cpd_onnx.rewrite.plan import load_plan, nested
from cpd_onnx.rewrite.plan import schema as plan_schema
from cpd_onnx.workflow import defaults
from tests.support.digits import MODELS, small_digits
from tests.support.models import from_text
from tests.support.runs import plain

pytest.importorskip("torch")

SHORT = ("--steps", 6, "--batch-size", 32, "--threads", 1)


def filled(folder: Path) -> Path:
    """With a small model and some data."""
    onnx.save(small_digits(), folder / "digits.onnx")
    for part, count in (("train", 128), ("test", 64)):
        arrays = dict(np.load(MODELS / f"digits_{part}.npz"))
        np.savez(folder / f"{part}.npz", **{name: array[:count] for name, array in arrays.items()})
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(filled(tmp_path))
    return tmp_path


def run(*arguments: object) -> int:
    return main(plain([*map(str, arguments)]))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything."""
    place = filled(tmp_path_factory.mktemp("whole"))
    data = ("--data", place / "train.npz", "--eval", place / "test.npz", "--watch", place / "test.npz")
    asked = ("-o", place / "small.onnx", "--target", "macs=0.5", "--watch-every", 3, *data, *SHORT)
    assert run("compress", place / "digits.onnx", *asked) == 0
    return place


@pytest.fixture
def report(whole: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((whole / "small.onnx.report.json").read_text())
    return found


def test_everything_lies_beside_the_model_and_nothing_else(whole: Path, report: dict[str, Any]) -> None:
    made = {path.name for path in whole.iterdir()} - {"digits.onnx", "train.npz", "test.npz"}
    endings = ("", ".plan.json", ".recipe.toml", ".manifest.json", ".report.json", ".report.html", ".report.md")
    assert made == {f"small.onnx{ending}" for ending in endings}
    assert run("verify", whole / "digits.onnx", whole / "small.onnx") == 0
    assert report["after"]["macs"] / report["before"]["macs"] == pytest.approx(0.5, abs=0.03)
    assert report["bytes"]["after"] == (whole / "small.onnx").stat().st_size
    assert report["output"]["sha256"] == sha256(whole / "small.onnx")
    assert report["source"]["sha256"] == sha256(whole / "digits.onnx")


def test_the_report_has_what_was_measured(report: dict[str, Any]) -> None:
    assert list(report["accuracy"]["values"]) == ["original", "pruned and repaired", "distilled"]
    assert (report["accuracy"]["metric"], report["accuracy"]["samples"]) == ("top1", 64)
    assert [timing["model"] for timing in report["bench"]["timings"]] == ["digits.onnx", "small.onnx"]
    assert len(report["training"]["losses"]) == 6
    assert [entry["step"] for entry in report["training"]["watched"]] == [3, 6]
    assert report["repaired"]["fitted"]
    assert report["verification"]["passed"]
    assert report["verification"]["trained"] > 0
    widths = [(group["size"], group["kept"]) for group in report["groups"]]
    assert any(kept < size for size, kept in widths)
    assert all(1 <= kept <= size for size, kept in widths)
    names = [entry["group"] for entry in report["sensitivity"]["groups"]]
    assert names == [group["name"] for group in report["groups"]]
    assert report["provenance"]["versions"]["cpd-onnx"] == cpd.__version__


def test_a_manifest_names_every_file_and_its_run_can_be_repeated(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = whole / "small.onnx.manifest.json"
    manifest = json.loads(place.read_text())
    entries = {entry["file"]: entry for entry in (*manifest["inputs"], *manifest["outputs"])}
    assert set(entries) == {path.name for path in whole.iterdir()} - {place.name}
    for name, entry in entries.items():
        assert (entry["sha256"], entry["bytes"]) == (sha256(whole / name), (whole / name).stat().st_size)
    assert run("reproduce", place, "-o", tmp_path / "again", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    names = ["small.onnx", "small.onnx.plan.json"]
    assert [(row["file"], row["same"]) for row in found["files"]] == [(name, True) for name in names]
    assert sha256(tmp_path / "again" / "small.onnx") == sha256(whole / "small.onnx")


@pytest.mark.parametrize("what", ["model", "data", "result", "json"])
def test_reproduce_says_what_is_not_as_it_was(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--target", "macs=0.5", "--no-report", "--no-distill", "--data", "train.npz", "--repair-samples", 32)
    assert run("compress", "digits.onnx", "-o", "small.onnx", *asked) == 0
    place = folder / "small.onnx.manifest.json"
    manifest = json.loads(place.read_text())
    if what == "model":
        shutil.move("digits.onnx", "moved.onnx")
        assert run("reproduce", place, "-o", "again", "--model", "moved.onnx") == 0
    elif what == "data":
        shutil.copy("test.npz", "train.npz")
    elif what == "result":
        manifest["outputs"][0]["sha256"] = "0" * 64
        manifest["versions"]["onnx"] = "0.1"
        place.write_text(json.dumps(manifest))
    else:
        place.write_text("{")
    capsys.readouterr()
    assert run("reproduce", place, "-o", "more") == 1
    wanted = {
        "model": "does not exist: name the model with --model",
        "data": "has changed: its SHA-256 must be",
        "result": "differ from those of the manifest; possible cause: onnx 0.1 then",
        "json": "is not JSON",
    }
    assert wanted[what] in capsys.readouterr().err


def test_without_data_it_does_what_can_be_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compress", "digits.onnx", "-o", "small.onnx") == 0
    shown = capsys.readouterr().out
    assert "note: no data: channels were chosen" in shown
    report = json.loads((folder / "small.onnx.report.json").read_text())
    assert report["training"] is report["repaired"] is report["accuracy"] is report["sensitivity"] is None
    assert report["budget"]["score"] == "l2"
    assert report["budget"]["policy"] == "uniform"
    assert report["verification"]["is_replay"]
    assert "generated inputs" in report["advice"][0]


def test_without_torch_it_is_pruned_and_repaired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "can_train", lambda: False)
    assert run("compress", "digits.onnx", "-o", "small.onnx", "--data", "train.npz", "--repair-samples", 32) == 0
    report = json.loads((folder / "small.onnx.report.json").read_text())
    assert report["training"] is None
    assert report["repaired"]["fitted"]
    assert any("torch is not installed" in line for line in report["advice"])
    assert list(report["accuracy"]["values"]) == ["original", "pruned and repaired"]
    assert report["accuracy"]["on"] == "the original's answers"
    assert run("compress", "digits.onnx", "-o", "b.onnx", "--data", "train.npz", "--distill") == 1
    assert not (folder / "b.onnx").exists()


def test_training_that_makes_it_worse_is_undone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ("--data", "train.npz", "--steps", 4, "--lr", 0.05, "--threads", 1, "--no-sensitivity")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *bad) == 0
    assert "note: training was undone: it moved the outputs on " in capsys.readouterr().out
    report = json.loads((folder / "small.onnx.report.json").read_text())
    found = report["training"]["held_out"]
    assert found["after"] > found["before"]
    assert not found["kept"]
    values = report["accuracy"]["values"]
    assert values["distilled"] == values["pruned and repaired"]
    assert "the weights before the training were kept" in (folder / "small.onnx.report.md").read_text()


def test_training_on_synthetic_samples_that_makes_it_worse_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ("--data", "synthetic", "--steps", 4, "--lr", 1.0, "--threads", 1, "--no-report")
    assert run("compress", "digits.onnx", "-o", "small.onnx", "--eval", "test.npz", *bad) == 0
    assert "note: training made the model worse (" in capsys.readouterr().out


def test_a_plan_is_carried_out(folder: Path) -> None:
    assert run("prune", "digits.onnx", "-o", "a.onnx", "--target", "macs=0.4") == 0
    asked = ("--like", "a.onnx.plan.json", "--data", "train.npz", "--no-distill", "--no-report", "--repair-samples", 32)
    assert run("compress", "digits.onnx", "-o", "b.onnx", *asked) == 0
    plans = [cpd.load_plan(folder / f"{name}.onnx.plan.json") for name in ("a", "b")]
    assert plans[1].without_values().dumps() == plans[0].dumps()
    assert plans[1].values
    assert run("compress", "digits.onnx", "-o", "c.onnx", *asked, "--rounds", 2) == 1
    np.savez(folder / "other.npz", x=np.zeros(1))
    shutil.copy(folder / "a.onnx", folder / "other.onnx")
    assert run("compress", "other.onnx", "-o", "d.onnx", *asked) == 1


def test_nothing_is_lost_and_nothing_begun_where_something_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "small.onnx.report.html").write_text("mine")
    assert run("compress", "digits.onnx", "-o", "small.onnx") == 1
    assert "small.onnx.report.html exists" in capsys.readouterr().err
    assert not (folder / "small.onnx").exists()
    assert run("compress", "digits.onnx", "-o", "small.onnx", "--force") == 0
    assert "<html" in (folder / "small.onnx.report.html").read_text()


def stopped(folder: Path, *arguments: object) -> None:
    """Run until there is a checkpoint, and stop."""
    line = [sys.executable, "-m", "cpd_onnx", *plain(arguments), "--checkpoint-seconds", "0"]
    child = subprocess.Popen(line, cwd=folder, stderr=subprocess.DEVNULL, env=dict(os.environ))
    end = time.monotonic() + 120
    while not (folder / "small.onnx.checkpoint.1").exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130


def test_a_run_that_was_stopped_goes_on_with_what_it_had_measured(folder: Path) -> None:
    """A latency is never measured alike twice: the channels that were chosen are on record."""
    shutil.copy(MODELS / "digits.onnx", folder)  # whose latency stands out of the noise
    training = ("--data", "train.npz", "--repair-samples", 64, "--steps", 60, "--batch-size", 32, "--threads", 1)
    asked = ("compress", "digits.onnx", "-o", "small.onnx", "--target", "latency=0.7", "--no-report", *training)
    asked += ("--effort", 0, "--samples", 32, "--round-to", 8)
    stopped(folder, *asked)
    chosen = json.loads((folder / "small.onnx.checkpoint.1.json").read_text())["chosen"]["removed"]
    assert run(*asked) == 1
    assert run(*asked, "--resume", "--lr", 0.1) == 1
    assert run(*asked, "--resume") in (0, TARGET_MISSED)
    plan = json.loads((folder / "small.onnx.plan.json").read_text())
    assert [group["removed"] for group in plan["groups"]] == chosen
    assert not list(folder.glob("*.checkpoint*"))
    assert run("reproduce", "small.onnx.manifest.json", "-o", "again") == 0


def feeds_of_five() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"image": rng.random((5, 1, 8, 8), np.float32)} for _ in range(4)]


def test_whole_feeds_are_as_large_as_they_are(folder: Path, importable: str) -> None:
    asked = ("--data", f"{importable}:feeds_of_five", "--repair-samples", 20, "--samples", 20)
    assert run("prune", "digits.onnx", "-o", "small.onnx", "--target", "macs=0.5", *asked) == 0


def test_what_goes_to_a_target_can_be_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ("--int8", "--data", "train.npz", "--samples", 32, "--batch", 1, "--ort", "small.ort")
    assert run("deploy", "digits.onnx", "-o", "small.onnx", *made) == 0
    place = folder / "small.onnx.manifest.json"
    manifest = json.loads(place.read_text())
    files = {entry["role"]: entry for entry in (*manifest["inputs"], *manifest["outputs"])}
    assert {"model", "data", "ort"} == set(files)
    assert files["ort"]["sha256"] == sha256(folder / "small.ort")
    assert run("reproduce", place, "-o", "again") == 0
    assert "small.onnx: identical" in capsys.readouterr().out
    assert run("deploy", "digits.onnx", "-o", "small.onnx", *made) == 1


# Sweeps.


def here() -> Executor:
    return ThreadPoolExecutor(1)


def not_one() -> list[str]:
    return []


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "executors_of_tests", sys.modules[__name__])
    return "executors_of_tests"


def test_a_sweep_makes_all_and_picks_one(folder: Path, importable: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "train.npz", "--eval", "test.npz", "--no-distill", "--repair-samples", 64)
    asked = ("sweep", "digits.onnx", "-o", "out", "--targets", "macs=0.6,0.3", *data, "--most-lost", 1.0)
    assert run(*asked, "--executor", f"{importable}:here") == 0
    assert "picked macs=" in capsys.readouterr().out
    report = json.loads((folder / "out" / "sweep.json").read_text())
    points = report["sweep"]["points"]
    assert [point.get("verification") for point in points] == [None, *[{"verdict": "verified", "passed": True}] * 2]
    assert [point["name"] for point in points] == ["the original", "macs=0.6", "macs=0.3"]
    assert [point["macs"] for point in points] == pytest.approx([1.0, 0.6, 0.3], abs=0.05)
    fastest = min(points[1:], key=lambda point: point["ms"])
    assert [point["picked"] for point in points] == [point is fastest for point in points]
    for name in ("macs=0.6", "macs=0.3"):
        assert run("verify", "digits.onnx", f"out/{name}.onnx") == 0
    assert (folder / "out" / "sweep.svg").read_text().count("<svg") == 1
    assert run(*asked) == 1


def test_the_models_of_a_nested_sweep_have_one_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("macs=0.6", "macs=0.3", "macs=0.15")
    data = ("--data", "train.npz", "--no-distill", "--repair-samples", 64, "--jobs", 1)
    assert run("sweep", "digits.onnx", "-o", "out", "--targets", "macs=0.3,0.15,0.6", *data, "--nested") == 0
    assert "out/sweep.plan.json" in capsys.readouterr().out.split("wrote ")[1]
    whole, plans = load_plan("out/sweep.plan.json"), [load_plan(f"out/{name}.onnx.plan.json") for name in names]
    jsonschema.validate(whole.content, plan_schema())
    assert whole.steps == names
    assert [whole.at(name).content for name in names] == [plan.content for plan in plans]
    for larger, smaller in itertools.pairwise(plans):
        assert all(set(gone) <= set(smaller.removed[index]) for index, gone in larger.removed.items())
        assert sum(map(len, larger.removed.values())) < sum(map(len, smaller.removed.values()))
    for name in names:
        assert run("verify", "digits.onnx", f"out/{name}.onnx", "--plan", "out/sweep.plan.json", "--step", name) == 0
    assert run("apply", "digits.onnx", "out/sweep.plan.json", "--step", "macs=0.3", "-o", "step.onnx") == 0
    assert run("apply", "digits.onnx", "out/macs=0.3.onnx.plan.json", "-o", "alone.onnx") == 0
    assert Path("step.onnx").read_bytes() == Path("alone.onnx").read_bytes()
    assert run("apply", "digits.onnx", "out/sweep.plan.json", "-o", "smallest.onnx") == 0
    assert run("apply", "digits.onnx", "out/macs=0.15.onnx.plan.json", "-o", "last.onnx") == 0
    assert Path("smallest.onnx").read_bytes() == Path("last.onnx").read_bytes()
    assert run("apply", "digits.onnx", "out/sweep.plan.json", "--step", "macs=0.5", "-o", "none.onnx") == 1
    assert "no step 'macs=0.5': its steps are macs=0.6, macs=0.3, macs=0.15" in capsys.readouterr().err
    with pytest.raises(PlanError, match="lacks"):
        nested(dict(zip(names, reversed(plans), strict=True)))


def rmse(outputs: list[Any], labels: list[Any]) -> float:
    """An error, which its name says; the pruned model has more of it."""
    return float(np.sqrt(np.square(outputs[0] - np.eye(10)[labels[0]]).mean()))


def rise(outputs: list[Any], labels: list[Any]) -> float:
    """The same, of which more is taken to be better."""
    return rmse(outputs, labels)


def cost(outputs: list[Any], labels: list[Any]) -> float:
    """The same, which says by its attribute that less is better."""
    return rmse(outputs, labels)


cost.lower_is_better = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(("metric", "is_lower"), [("rmse", True), ("rise", False), ("cost", True)])
def test_a_metric_of_ones_own_has_one_direction_everywhere(
    folder: Path, importable: str, metric: str, is_lower: bool
) -> None:
    """Where less is better the pruned model has lost something, where more is it has gained."""
    data = (
        "--data",
        "train.npz",
        "--eval",
        "test.npz",
        "--no-distill",
        "--no-repair",
        "--metric",
        f"{importable}:{metric}",
    )
    asked = ("sweep", "digits.onnx", "-o", "out", "--targets", "macs=0.3", *data, "--most-lost", 0)
    code = run(*asked, "--executor", f"{importable}:here")
    found = json.loads((folder / "out" / "sweep.json").read_text())["sweep"]
    before, after = (point["accuracy"] for point in found["points"])
    assert after != before
    assert found["points"][1]["picked"] == ((after < before) == is_lower)
    assert code == (0 if any(point.get("picked") for point in found["points"][1:]) else 4)
    assert found["lower_is_better"] == is_lower


def test_a_sweep_is_made_in_processes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sweep", "digits.onnx", "-o", "out", "--targets", "macs=0.6,0.3", "--jobs", 2) == 0
    written = capsys.readouterr().out.split("wrote ")[1].split(", ")
    assert all((folder / name.strip()).exists() for name in written)
    names = ("macs=0.6.onnx", "macs=0.3.onnx")
    assert all((folder / "out" / name).exists() for name in names)
    assert run("prune", "digits.onnx", "-o", "a.onnx", "--target", "macs=0.3") == 0
    a, b = (json.loads((folder / name).read_text()) for name in ("a.onnx.plan.json", "out/macs=0.3.onnx.plan.json"))
    assert a["removed"] == b["removed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "macs=0.5,params=0.5"], "all targets of a sweep must be of one kind"),
        (["--targets", "macs=0.5", "--most-lost", "0.1"], "--max-loss needs a metric"),
        (["--targets", "macs=0.5", "--executor", "executors_of_tests:not_one"], "returned a list, not a concurrent"),
    ],
)
def test_what_is_wrong_with_a_sweep(
    folder: Path, importable: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "digits.onnx", "-o", "out", *arguments) == 1
    assert message in capsys.readouterr().err


ONE_SIZE = (
    "(float[N, S, 6] x, float[6, 8] w, float[56, 5] v, int64[2] s) => (float[N, 5] y) "
    "{ h = MatMul(x, w) a = Relu(h) r = Reshape(a, s) y = MatMul(r, v) }"
)
"""Takes seven positions, though its input says any number: nothing is known of it without `--input-shape`."""


def test_input_shapes_hold_for_all_that_is_measured_of_the_result(folder: Path) -> None:
    """The sensitivity in the report folds pruned models, too."""
    onnx.save(from_text(ONE_SIZE, values={"s": [-1, 56]}), "fixed.onnx")
    np.savez("x.npz", x=np.random.default_rng(0).standard_normal((64, 7, 6)).astype(np.float32))
    asked = ("--input-shape", "x:2,7,6", "--data", "x.npz", "--no-distill", "--threads", 1)
    assert run("compress", "fixed.onnx", "-o", "small.onnx", *asked) == 0
    report = json.loads(Path("small.onnx.report.json").read_text())
    assert [len(group["points"]) for group in report["sensitivity"]["groups"]] == [3]
    assert json.loads(Path("small.onnx.plan.json").read_text())["source"]["input_shapes"] == {"x": [2, 7, 6]}
    assert run("verify", "fixed.onnx", "small.onnx") == 0
