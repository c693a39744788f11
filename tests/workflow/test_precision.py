"""Compress to a number format: the pruned float model and what is made from it, both of which are proved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from cpd_onnx.budget.latency import LatencyProbe
from cpd_onnx.cli.main import main
from cpd_onnx.deploy.converting import quantised_node
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import load
from cpd_onnx.report.document import schema
from cpd_onnx.workflow.quality import precise
from tests.support.digits import MODELS, small_digits
from tests.support.runs import plain

QUICK = ("--data", "train.npz", "--repair-samples", 32, "--samples", 32, "--no-distill")
FILES = {
    "small.onnx", "small.onnx.manifest.json", "small.float32.onnx", "small.float32.onnx.recipe.toml",
    "small.float32.onnx.plan.json", "small.float32.onnx.manifest.json",
}  # fmt: skip  # a list


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(small_digits(), tmp_path / "digits.onnx")
    for part, count in (("train", 128), ("test", 64)):
        arrays = dict(np.load(MODELS / f"digits_{part}.npz"))
        np.savez(tmp_path / f"{part}.npz", **{name: array[:count] for name, array in arrays.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> int:
    return main(plain([*map(str, arguments)]))


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"digits.onnx", "train.npz", "test.npz"}


def is_quantised(path: str) -> bool:
    return quantised_node(load(path)) is not None


def test_both_models_are_written_and_proved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--precision", "int8", "--eval", "test.npz", "--json", "-")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, *asked, "--sensitivity") == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    known = schema()
    jsonschema.validate(content["precision"], {**known["properties"]["precision"], "$defs": known["$defs"]})
    pages = {f"small.float32.onnx.report.{kind}" for kind in ("json", "html", "md")}
    assert made(folder) == FILES | pages
    assert is_quantised("small.onnx")
    assert not is_quantised("small.float32.onnx")
    assert content["precision"]["asked"] == "int8"
    assert content["precision"]["file"] == "small.onnx"
    (proved,) = (each["text"] for each in content["verdict"]["answers"] if each["question"] == "proved")
    assert proved.startswith("the structure of the float model that it is made of equals the original's")
    assert any(note.startswith("small.onnx has 8-bit integers in ") for note in content["notes"])
    assert content["bytes"]["after"] == (folder / "small.onnx").stat().st_size
    assert list(content["accuracy"]["values"]) == ["original", "pruned and repaired", "converted"]
    assert run("verify", "digits.onnx", "small.float32.onnx") == 0
    assert run("verify", "digits.onnx", "small.onnx") == 0
    assert run("audit", "small.onnx", "-o", "audit") == 0
    collected = {path.name for path in (folder / "audit").iterdir()}
    assert {"digits.onnx", "small.onnx", "small.float32.onnx", "small.float32.onnx.plan.json"} <= collected


@pytest.mark.parametrize("name", ["small.onnx", "small.float32.onnx"])
def test_both_runs_can_be_repeated(folder: Path, name: str) -> None:
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, "--no-report", "--precision", "int8") == 0
    assert run("reproduce", f"{name}.manifest.json", "-o", "again") == 0
    assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_changed_result_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, "--no-report", "--precision", "int8") == 0
    model = load("small.onnx")
    scale = next(tensor for tensor in model.proto.graph.initializer if tensor.name.endswith("_scale"))
    model.set_array(scale.name, 2 * model.array(scale.name))
    model.save("small.onnx", overwrite=True)
    assert run("verify", "digits.onnx", "small.onnx") != 0
    assert "small.onnx is not the result of the steps" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "names"), [(3.0, {"small.onnx"}), (0.3, {"small.onnx", "small.float32.onnx"})])
def test_integers_are_chosen_where_they_are_faster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, factor: float, names: set[str]
) -> None:
    def ratio_of(probe: LatencyProbe, model: Any, seconds: float = 2.0) -> float:
        return factor if quantised_node(model) is not None else 1.0

    monkeypatch.setattr(LatencyProbe, "ratio_of", ratio_of)
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, "--no-report", "--precision", "auto") == 0
    assert {name for name in made(folder) if name.endswith(".onnx")} == names
    assert is_quantised("small.onnx") == (len(names) == 2)


@pytest.mark.parametrize("taken", ["small.onnx", "small.float32.onnx"])
def test_what_exists_is_not_replaced(folder: Path, taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / taken).write_text("mine")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, "--no-report", "--precision", "int8") == 1
    assert f"{taken} exists" in capsys.readouterr().err
    assert made(folder) == {taken}
    assert (folder / taken).read_text() == "mine"


def test_without_data_there_are_no_ranges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compress", "digits.onnx", "-o", "small.onnx", "--no-report", "--precision", "int8") == 1
    assert "--precision int8 needs samples that numbers are fitted to: give --data" in capsys.readouterr().err
    assert made(folder) == set()


def test_a_target_of_flash_counts_integers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(MODELS / "digits.onnx", folder)
    asked = ("--precision", "auto", "--target", "flash=150kB", "--no-report", "--json", "-")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, *asked) == 0
    content = json.loads(capsys.readouterr().out)
    assert is_quantised("small.onnx")
    assert content["asked"][0]["is_met"]
    assert (folder / "small.float32.onnx").stat().st_size > 250e3
    assert (folder / "small.onnx").stat().st_size < 200e3


def is_half(path: str) -> bool:
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in load(path).graph.initializer)


@pytest.mark.parametrize("data", [QUICK[:2], ()])
def test_halves_are_written_proved_and_repeated(folder: Path, data: tuple[str, ...]) -> None:
    asked = ("--precision", "float16", "--target", "bytes=0.35", "--no-report", "--json", "made.json", "--no-distill")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *(data or ["--blind"]), *asked) == 0
    content = json.loads((folder / "made.json").read_text())
    assert is_half("small.onnx")
    assert not is_half("small.float32.onnx")
    assert content["precision"]["what"] == "16-bit floats"
    size = (folder / "small.onnx").stat().st_size / (folder / "digits.onnx").stat().st_size
    assert content["asked"][0]["is_met"]
    assert size == pytest.approx(0.35, abs=0.02)
    assert run("verify", "digits.onnx", "small.onnx") == 0
    assert run("reproduce", "small.onnx.manifest.json", "-o", "again") == 0
    assert (folder / "again" / "small.onnx").read_bytes() == (folder / "small.onnx").read_bytes()


def test_integers_count_as_they_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--precision", "int8", "--target", "bytes=0.3", "--no-report", "--json", "-")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, *asked) == 0
    assert json.loads(capsys.readouterr().out)["asked"][0]["is_met"]
    size = (folder / "small.onnx").stat().st_size / (folder / "digits.onnx").stat().st_size
    assert size == pytest.approx(0.3, abs=0.02)


def test_flash_counts_integers_beside_a_target_of_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--precision", "int8", "--target", "flash=0.7,bytes=0.9", "--no-report", "--json", "-")
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, *asked) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["stored_as"] == "int8"


@pytest.mark.parametrize("target", ["flash=0.5", "bytes=0.35"])
def test_what_loses_too_much_as_integers_has_halves(folder: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    asked = ("--precision", "auto", "--max-loss", "0.3", "--target", target, "--no-report")
    monkeypatch.setattr(precise, "whole", refuse)
    monkeypatch.setattr(precise, "narrowest", lambda *_: None)
    assert run("compress", "digits.onnx", "-o", "small.onnx", *QUICK, *asked) == 0
    assert is_half("small.onnx")
    assert any(node.op_type == "Cast" for node in load("small.onnx").graph.node)


def refuse(*_: object) -> None:
    raise UnsupportedError("it cannot be quantised")
