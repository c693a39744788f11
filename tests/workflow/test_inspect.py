"""inspect: what a model takes and gives, what is free in it, how far it goes; for one file and for many."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import cpd_onnx as cpd
from cpd_onnx.budget.latency import measure_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.cli.main import main
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.workflow.api import run
from cpd_onnx.workflow.requests import Inspect
from tests.support.machine import MadeUp, stack
from tests.support.models import from_text

DIGITS = Path(__file__).parents[2] / "models" / "digits.onnx"
CONV = "Conv <pads = [1, 1, 1, 1]>"
TEXT = (
    "(float[N, 3, 6, 6] x, float[8, 3, 3, 3] w, float[8] b, float[5, 8, 3, 3] v) => (float[N, 5, 6, 6] y) "
    f"{{ h = {CONV}(x, w, b) r = Relu(h) y = {CONV}(r, v) }}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of which two channels are dead, and a file that is not a model."""
    monkeypatch.chdir(tmp_path)
    model = from_text(TEXT)
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, number in (("w", 0.0), ("b", -1.0)):
        array = numpy_helper.to_array(by_name[name]).copy()
        array[[2, 5]] = number
        by_name[name].CopyFrom(numpy_helper.from_array(array, name))
    model.producer_name = "a test"
    onnx.save(model, "m.onnx")
    Path("text.onnx").write_text("no model")
    return tmp_path


def test_the_result_says_what_the_model_is(folder: Path) -> None:
    content = run(Inspect(models=(Path("m.onnx"),)))
    assert content is not None
    model = content["model"]
    assert model["inputs"] == [{"name": "x", "type": "float", "shape": ["N", 3, 6, 6]}]
    assert model["outputs"] == [{"name": "y", "type": "float", "shape": ["N", 5, 6, 6]}]
    assert model["open_axes"] == [{"input": "x", "axis": 0, "name": "N"}]
    assert (model["opset"]["ai.onnx"], model["ir_version"], model["producer"]) == (17, 8, "a test")
    assert model["onnxruntime"]["loads"] is True
    assert content["size"]["file_bytes"] == Path("m.onnx").stat().st_size
    assert content["free"]["dead"]["channels"] == 2
    assert content["free"]["dead"]["macs"] == content["costs"]["macs"] / 4
    assert content["free"]["groups"] == [{"id": 0, "zero": [2, 5], "unread": [], "constant": [], "duplicate": []}]
    assert content["reach"]["macs"] == pytest.approx(1 / 8)


def test_what_is_free_is_what_the_pass_removes(folder: Path) -> None:
    content = run(Inspect(models=(Path("m.onnx"),)))
    state = cpd.run("comb, lossless, prune, verify{allow_inconclusive=True}", Path("m.onnx"))
    assert content is not None
    assert state.allocation is not None
    assert content["free"]["dead"]["macs"] == state.allocation.before.macs - state.allocation.after.macs


def test_pinned_groups_are_not_reachable(folder: Path) -> None:
    content = run(Inspect(models=(Path("m.onnx"),), keep=("w",)))
    assert content is not None
    assert content["reach"] == {"macs": 1.0, "params": 1.0, "bytes": 1.0}


def test_the_command_says_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "m.onnx"]) == 0
    said = capsys.readouterr().out
    for line in (
        "takes x: float [N, 3, 6, 6]",
        "gives y: float [N, 5, 6, 6]",
        "by a test",
        "loads it",
        "free: 2 of the 8 channels are dead, and hold 25.0 % of the MACs",
        "smallest reachable: 12.5 % of the MACs",
        "to remove what is free: cpd-onnx compress m.onnx -o m.small.onnx",
    ):
        assert line in said


def test_a_model_that_onnxruntime_refuses_is_inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(from_text(TEXT.replace("Relu(h)", "local.Strange(h)")), "strange.onnx")
    assert main(["inspect", "strange.onnx"]) == 0
    assert "onnxruntime cannot run the model" in capsys.readouterr().out


def test_several_models_are_a_row_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "m.onnx", str(DIGITS), "--json", "all.json"]) == 0
    said = capsys.readouterr().out
    assert "m.onnx" in said
    assert "digits.onnx" in said
    content = json.loads(Path("all.json").read_text())
    assert (content["format"], content["version"]) == ("cpd-onnx/inspections", 1)
    assert [entry["source"]["file"] for entry in content["models"]] == ["m.onnx", "digits.onnx"]
    assert main(["inspect", "m.onnx", "--json", "-"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == content["models"][0]


def test_one_bad_file_does_not_hide_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "text.onnx", "m.onnx", "nothing.onnx"]) == 1
    found = capsys.readouterr()
    assert "loads it" in found.out
    assert "text.onnx: " in found.out
    assert "error: 2 of 3 models could not be inspected" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.onnx", "m.onnx", "--html", "p.html"], "take one model"),
        (["m.onnx", "--cost-table", "m.onnx"], "give --html FILE"),
        (["m.onnx", "--cost-table", "m.onnx", "--html", "p.html"], "not a cost table"),
        (["m.onnx", "--html", "m.onnx", "--force"], "both an input and an output"),
        (["m.onnx", "--html", "text.onnx"], "exists"),
        (["m.onnx", "--html", "p.html", "--json", "p.html"], "two outputs"),
        (["m.onnx", "--html", "no/p.html"], "no"),
    ],
)
def test_what_does_not_go_together_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert main(["inspect", *words]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_page_predicts_milliseconds_from_a_cost_table(folder: Path) -> None:
    pytest.importorskip("jinja2")
    onnx.save(stack(), "stack.onnx")
    measure_table(MadeUp(comb(Path("stack.onnx")), Setting())).save(Path("table.json"))
    assert main(["inspect", "stack.onnx", "--html", "p.html", "--cost-table", "table.json"]) == 0
    text = Path("p.html").read_text()
    assert 'id="cost-ms"' in text
    assert '"ms":{"axes"' in text
    assert main(["inspect", str(DIGITS), "--html", "q.html", "--cost-table", "table.json"]) == 1
    assert not Path("q.html").exists()
