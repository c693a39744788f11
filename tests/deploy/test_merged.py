"""Linear operators as one in a deployed file: the step, its record, and the files that prune and compress write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cpd_onnx.budget.latency import LatencyProbe
from cpd_onnx.cli.main import main
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy import merged
from cpd_onnx.deploy.quantize import Quantization
from cpd_onnx.deploy.steps import Deployment, deploy, redo
from cpd_onnx.errors import TargetError, UnsupportedError
from cpd_onnx.ir.model import load
from cpd_onnx.report.verdict import TARGET_MISSED
from tests.support.models import from_text
from tests.support.runs import plain

BLOCKS = (
    "(float[N,3,16,16] x, float[8,3,3,3] a, float[8] b, float[16,8,1,1] c, float[16] s, float[16] t, float[16] m, "
    "float[16] u, float[6,16,1,1] d, float[6] e, float[4,6,3,3] f, float[4] g) => (float[N,4,12,12] y) "
    "{ i = Conv(x, a, b) j = Relu(i) k = Conv(j, c) l = BatchNormalization(k, s, t, m, u) p = Conv(l, d, e) "
    "q = Relu(p) y = Conv(q, f, g) }"
)
MERGED = "Conv 'k', BatchNormalization 'l' merged into Conv 'p'"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(from_text(BLOCKS), path)
    return path


def run(*arguments: object) -> int:
    return main(list(map(str, arguments)))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def nodes(path: Path) -> list[str]:
    return [node.output[0] for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("measure", ["macs", "bytes"])
def test_the_step_is_recorded_and_verified(model: Path, capsys: pytest.CaptureFixture[str], measure: str) -> None:
    out = model.with_name("out.onnx")
    assert run("deploy", model, "-o", out, "--merge", measure) == 0
    assert f"note: {MERGED}" in said(capsys)
    assert nodes(out) == ["i", "j", "p", "q", "y"]
    (step,) = json.loads(out.with_name("out.onnx.manifest.json").read_text())["steps"]
    assert step["options"] == {"measure": measure, "rounds": [[["k", "p"]]]}
    assert step["difference"]["allowed"] == 1e-4
    assert run("verify", model, out) == 0
    assert "out.onnx equals, value for value, the result of these steps" in said(capsys)
    assert run("reproduce", out.with_name("out.onnx.manifest.json"), "-o", model.with_name("again")) == 0
    assert (model.with_name("again") / "out.onnx").read_bytes() == out.read_bytes()


def test_another_value_or_another_record_is_not_verified(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, record = model.with_name("out.onnx"), model.with_name("out.onnx.manifest.json")
    assert run("deploy", model, "-o", out, "--merge", "macs") == 0
    content = record.read_text()
    for old, new, reason in [
        ('"k"', '"i"', "options of the step 'merge' are not valid"),
        ('"measure": "macs"', '"measure": "ms"', "options of the step 'merge' are not valid"),
        ('"measure": "macs"', '"measured": "macs"', "options of the step 'merge' are not valid"),
    ]:
        assert old in content
        record.write_text(content.replace(old, new))
        assert run("verify", model, out) == 1
        assert reason in said(capsys)
    record.write_text(content)
    edited = onnx.load(out)
    weight = next(tensor for tensor in edited.graph.initializer if tensor.name == "d")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] *= 2
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "d"))
    onnx.save(edited, out)
    assert run("verify", model, out, "--manifest", record) == 5
    assert "out.onnx is not the result of the steps" in said(capsys)


def test_what_is_faster_is_measured_once_and_recorded(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([[2.0, 1.0], [20.0, 19.0]])
    monkeypatch.setattr(merged, "latency_ratio", lambda models, feed, **_: next(seconds))
    out = model.with_name("out.onnx")
    assert run("deploy", model, "-o", out, "--merge", "latency") == 0
    shown = said(capsys)
    assert f"note: {MERGED}" in shown
    assert "note: 2e+04 -> 1.9e+04 ms for the whole model" in shown
    record = out.with_name("out.onnx.manifest.json")
    assert run("verify", model, out) == 0  # does not measure
    assert run("reproduce", record, "-o", model.with_name("again")) == 0  # neither
    monkeypatch.setattr(merged, "latency_ratio", lambda models, feed, **_: [2.0, 3.0])
    assert run("deploy", model, "-o", out, "--merge", "latency", "--force") == 0
    assert nodes(out) == nodes(model)
    assert run("reproduce", record, "-o", model.with_name("again"), "--force") == 0


@pytest.mark.parametrize(
    ("seconds", "note"),
    [
        ([[2.0, 1.99]], "1 linear run not merged, as one operator would not cost less: 'k' to 'p'"),
        ([[2.0, 1.0], [0.02, 0.03]], "nothing was merged, as it would take longer: 20 -> 30 ms for the whole model"),
    ],
)
def test_what_is_not_faster_is_left(
    model: Path, monkeypatch: pytest.MonkeyPatch, seconds: list[list[float]], note: str
) -> None:
    times = iter(seconds)
    monkeypatch.setattr(merged, "latency_ratio", lambda models, feed, **_: next(times))
    before = load(model)
    done = deploy(before, Deployment(merge="latency"))
    assert done.model is before
    assert [(step.name, step.notes, step.options) for step in done.steps] == [("merge", (note,), None)]


def test_latency_is_really_measured(model: Path) -> None:
    (step,) = deploy(load(model), Deployment(merge="latency")).steps
    assert step.notes


def test_a_model_without_linear_runs_says_so() -> None:
    graph = "(float[N,4] x, float[4,4] w) => (float[N,4] y) { h = MatMul(x, w) y = Relu(h) }"
    (step,) = deploy(load(from_text(graph)), Deployment(merge="macs")).steps
    assert step.notes == ("no two linear operators have nothing but affine ones between them",)


def test_weights_are_converted_after_they_are_multiplied(model: Path) -> None:
    for more in ({"half": "float16"}, {"int8": Quantization(samples=4)}):
        data = ArraySource({"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)})
        done = deploy(load(model), Deployment(merge="macs", **more), data)
        assert [step.name for step in done.steps] == ["merge", next(iter(more))]
        assert "k" not in {name for node in done.model.graph.node for name in node.output}


def test_a_quantised_model_has_no_linear_runs(model: Path) -> None:
    data = ArraySource({"x": np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)})
    quantised = deploy(load(model), Deployment(int8=Quantization(samples=4)), data).model
    assert deploy(quantised, Deployment(merge="macs")).model is quantised


def test_what_merging_saves_must_be_known() -> None:
    with pytest.raises(TargetError, match="what merging saves must be one of macs, bytes, latency, got 'ms'"):
        Deployment(merge="ms")
    with pytest.raises(TargetError, match="not valid: two linear runs of a round have a node in common"):
        redo(load(from_text(BLOCKS)), "merge", {"measure": "macs", "rounds": [[["k", "p"], ["k", "p"]]]})


def test_prune_writes_the_merged_model_as_well(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, fast = model.with_name("small.onnx"), model.with_name("fast.onnx")
    line = plain(["prune", model, "-o", small, "--target", "channels=0.75", "--blind", "--merged", fast])
    assert run(*line) == 0
    shown = said(capsys)
    assert f"note: {fast}: {MERGED}" in shown
    assert f"{fast} and {fast}.manifest.json" in shown
    assert nodes(small) == ["i", "j", "k", "l", "p", "q", "y"]
    assert nodes(fast) == ["i", "j", "p", "q", "y"]
    assert run("verify", model, fast) == 0
    shown = said(capsys)
    assert "From small.onnx to fast.onnx" in shown
    assert "verified: equals the original with the removed channels masked" in shown
    first = fast.read_bytes()
    assert run(*line, "--force") == 0
    assert fast.read_bytes() == first
    assert run(*line) == 1
    assert "exists" in said(capsys)


def test_the_pruned_model_is_written_even_if_the_merged_one_cannot_be(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedError("models over 2 GiB cannot be merged: prune the model below that first")

    monkeypatch.setattr(merged, "require_one_message", refuse)
    small, fast = model.with_name("small.onnx"), model.with_name("fast.onnx")
    assert run(*plain(["prune", model, "-o", small, "--blind", "--merged", fast])) == 0
    shown = said(capsys)
    assert f"note: {fast} was not written: models over 2 GiB cannot be merged" in shown
    assert f"wrote {small} and {small}.plan.json " in shown
    assert small.is_file()
    assert not fast.exists()


def test_compress_writes_the_merged_model_by_time_for_a_latency(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[Any] = []
    monkeypatch.setattr(
        merged, "_SAVINGS", dict.fromkeys(merged.MEASURES, lambda: lambda run, _: used.append(run) or 1.0)
    )
    monkeypatch.setattr(merged, "latency_ratio", lambda models, feed, **_: [2.0, 1.0])
    monkeypatch.setattr(LatencyProbe, "ratio_of", lambda *_, **__: 0.9)
    small, fast = model.with_name("small.onnx"), model.with_name("fast.onnx")
    line = ["compress", model, "-o", small, "--blind", "--no-report", "--no-distill", "--merged", fast]
    # Whether the widths of so small a model reach the target is decided by how busy the machine is.
    assert run(*plain([*line, "--target", "latency=0.9", "--keep-anyway"])) in (0, TARGET_MISSED)
    assert [run.pair for run in used] == [("k", "p")]
    assert nodes(fast) == ["i", "j", "p", "q", "y"]
    (step,) = json.loads(fast.with_name("fast.onnx.manifest.json").read_text())["steps"]
    assert step["options"]["measure"] == "latency"
    folder = model.with_name("folder")
    assert run("audit", fast, "-o", folder) == 0
    assert "merge" in said(capsys)


def test_inspect_says_what_merging_would_save(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = model.with_name("found.json")
    assert run("inspect", model, "--json", place) == 0
    assert "2 linear operators are cheaper as one, by 29.4 % of the MACs: cpd-onnx deploy" in said(capsys)
    before, after = 16 * 14 * 14 * (8 + 6), 8 * 14 * 14 * 6
    whole = before + 8 * 27 * 14 * 14 + 4 * 54 * 12 * 12
    assert json.loads(place.read_text())["merges"] == {
        "runs": 1, "cheaper": 1, "macs": pytest.approx((before - after) / whole)
    }  # fmt: skip  # a table
