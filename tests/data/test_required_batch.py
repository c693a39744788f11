"""Models whose signature leaves the batch open and whose graph requires a number: samples are run in that number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.data.agreement import agreement
from cpd_onnx.data.preflight import preflight
from cpd_onnx.data.signature import fixed_batch, run_inputs
from cpd_onnx.data.sources import LABELS, ArraySource, FunctionSource, calibration, inputs_of
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.deploy.quantize import Quantization, quantize
from cpd_onnx.ir.model import Model, load
from cpd_onnx.proof.files import data_feeds
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.stated import stated, stated_proto
from cpd_onnx.workflow.places import scored
from tests.support.models import from_text
from tests.support.runs import plain

COUNT = 9
"""Number of samples, no multiple of two."""


def network(batch: int) -> ModelProto:
    """Attention over three tokens, whose heads are divided by a constant that names the number of samples."""
    values = {
        "cut": [batch, 3, 2, 8], "joined": [batch, 3, 16], "axes": [1],
        **{name: np.random.default_rng(place).standard_normal(shape) / 2 for place, (name, shape) in enumerate(
            {"w1": (6, 16), "w2": (16, 12), "w3": (12, 5)}.items()
        )},
    }  # fmt: skip  # a table
    return from_text(
        "(float[N,3,6] x, float[6,16] w1, float[16,12] w2, float[12,5] w3, int64[4] cut, int64[3] joined, int64[1] axes)"
        """ => (float[N,5] y) {
        h = MatMul(x, w1)
        heads = Reshape(h, cut)
        q = Transpose<perm=[0,2,1,3]>(heads)
        k = Transpose<perm=[0,2,3,1]>(heads)
        scores = MatMul(q, k)
        p = Softmax(scores)
        a = MatMul(p, q)
        back = Transpose<perm=[0,2,1,3]>(a)
        m = Reshape(back, joined)
        u = MatMul(m, w2)
        r = Relu(u)
        f = ReduceMean<axes=[1], keepdims=0>(r)
        y = MatMul(f, w3)
        }""",
        values=values,
    )


def samples(count: int = COUNT) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {"x": rng.standard_normal((count, 3, 6)).astype(np.float32), LABELS: rng.integers(0, 5, count)}


@pytest.fixture(params=[1, 2])
def batch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def model(batch: int) -> Model:
    return load(network(batch))


def test_the_batch_is_that_of_the_operators(model: Model, batch: int) -> None:
    assert fixed_batch(inputs_of(model.proto)) is None
    assert fixed_batch(run_inputs(model)) == batch
    assert fixed_batch(inputs_of(stated(model).proto)) == batch
    assert fixed_batch(inputs_of(stated_proto(model.complete_proto()))) == batch
    assert fixed_batch(inputs_of(model.proto)) is None  # the signature of what is written stays open


def test_a_signature_that_says_all_is_the_same() -> None:
    free = load(from_text("(float[N,3] x, float[3,2] w) => (float[N,2] y) { y = MatMul(x, w) }"))
    fixed = load(from_text("(float[4,3] x, float[3,2] w) => (float[4,2] y) { y = MatMul(x, w) }"))
    for each in (free, fixed):
        assert stated(each) is each
        assert stated_proto(each.proto) is each.proto


def test_another_form_of_the_model_is_run_like_the_original(model: Model, batch: int) -> None:
    other = load(from_text("(float[N,3,6] x) => (float[N,3,6] y) { y = Relu(x) }"))
    assert fixed_batch(inputs_of(stated(other, model).proto)) == batch


def test_samples_come_in_batches_of_that_size(model: Model, batch: int) -> None:
    source = ArraySource(samples())
    whole = COUNT // batch
    assert [len(feed["x"]) for feed in calibration(model, source, COUNT)] == [batch] * whole
    assert [len(feed["x"]) for feed in data_feeds(model, source, 3)] == [batch] * 3
    assert {len(feed["x"]) for feed in calibration(model, Synthetic(fold(model)), 4)} == {batch}
    feeds = FunctionSource(lambda: iter([{"x": samples()["x"][:batch]}] * 2), inputs_of(model.proto))
    assert [len(feed["x"]) for feed in calibration(model, feeds, COUNT)] == [batch] * 2


@pytest.mark.parametrize("kind", ["wanda", "reconstruction", "fisher"])
def test_it_is_pruned_and_repaired_with_data(model: Model, kind: str) -> None:
    if kind == "fisher":
        pytest.importorskip("torch")
    text = f"comb, score{{kind='{kind}'}}, allocate{{channels=0.7}}, prune, repair, verify"
    state = cpd.run(text, model, data=ArraySource(samples(65)))
    assert state.repaired is not None
    assert state.repaired["fitted"]
    assert state.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_error_of_the_outputs_is_measured(model: Model) -> None:
    text = "comb, score{kind='l2'}, sensitivity{samples=16}, allocate{channels=0.7, policy='optimal'}, prune"
    assert cpd.run(text, model, data=ArraySource(samples(17))).curves is not None


def test_answers_are_compared_on_all_samples(model: Model) -> None:
    found = agreement(model, load(model.complete_proto()), ArraySource(samples()))
    assert found is not None
    assert (found.samples, found.value) == (COUNT, 1.0)


def test_labels_are_compared_on_all_samples(model: Model, batch: int) -> None:
    pytest.importorskip("torchmetrics")
    given, session = samples(), open_model(model)
    outputs = []
    for start in range(0, COUNT, batch):
        part = given["x"][start : start + batch]
        filled = np.concatenate([part, part[-1:]])[:batch]
        outputs.append(execute(session, {"x": filled})[0][: len(part)])
    wanted = float((np.concatenate(outputs).argmax(1) == given[LABELS]).mean())
    request = type("Request", (), {"metric": "top1", "detector": None})()
    assert scored(request, ArraySource(given), {"one": model}, model)["one"] == pytest.approx(wanted)
    request.metric = "mse"
    assert scored(request, ArraySource(given), {"one": model}, model)["one"] == 0.0


def test_samples_are_checked_before_a_run(model: Model) -> None:
    found = preflight(ArraySource(samples()), model, metric="top1")
    assert found.samples == COUNT


def test_ranges_are_found(model: Model) -> None:
    assert quantize(model, ArraySource(samples()), Quantization(samples=4)).has("w1_quantized")


def test_it_is_distilled(model: Model) -> None:
    pytest.importorskip("torch")
    from cpd_onnx.passes.distill import Watched, distill
    from cpd_onnx.training.options import DistillOptions

    proto = model.complete_proto()
    data = ArraySource(samples())
    options = DistillOptions(steps=3, lr=1e-3, batch_size=4)
    student = cpd.run("comb, score{kind='l2'}, allocate{channels=0.7}, prune", model).model.complete_proto()
    for metric in ("top1", "mse"):
        result = distill(proto, student, data, options, watched=Watched(data, metric, every=1))
        assert len(result.losses) == 3


def test_one_command_does_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    onnx.save(network(2), "model.onnx")
    np.savez("data.npz", **samples(81))
    line = "compress model.onnx -o small.onnx --target macs=0.7 --data data.npz --eval data.npz --steps 2 --threads 1"
    assert main(plain([*line.split(), "--round-to", "1", "--max-loss", "1.0", "--json", "made.json"])) in (0, 3)
    assert json.loads(Path("made.json").read_text())
    assert onnx.load("small.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert main(plain(["verify", "model.onnx", "small.onnx", "--data", "data.npz"])) == 0
