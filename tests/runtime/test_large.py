"""Models that do not fit into memory: the same results, read and run in pieces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.ir import model as graph
from cpd_onnx.ir.model import Lazy, Model, load
from cpd_onnx.proof import proving
from cpd_onnx.runtime import stepwise
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.runtime.stepwise import Piecewise
from cpd_onnx.shapes.inference import fold, fold_again
from tests.support.graphs import seeded
from tests.support.models import from_text
from tests.support.runs import plain

MEGABYTES = 400
STEPS = "comb, score, allocate, prune, verify"


@pytest.fixture
def all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((graph, "_LARGE_BYTES"), (graph, "_LAZY_BYTES"), (proving, "_PIECEWISE_BYTES")):
        monkeypatch.setattr(module, name, 0)
    for name in ("PIECE_BYTES", "_ENTERING_BYTES"):
        monkeypatch.setattr(stepwise, name, 0)
    monkeypatch.setattr(graph, "_DETACH_BYTES", 1)


def prunable(count: int) -> list[int]:
    """Seeds of graphs that something can be removed from."""
    found: list[int] = []
    seed = 0
    while len(found) < count:
        seed += 1
        try:
            cpd.run("comb, score, allocate", seeded(seed, is_common=True))
            found.append(seed)
        except cpd.TargetError:
            continue
    return found


def unsigned(model: Model) -> bytes:
    """The file without the hash of its plan, whose count of bytes depends on what is kept apart from the proto."""
    proto = model.complete_proto()
    del proto.metadata_props[:]
    return proto.SerializeToString()


@pytest.mark.parametrize("is_apart", [False, True], ids=["one file", "external data"])
def test_the_same_bytes(tmp_path: Path, request: pytest.FixtureRequest, is_apart: bool) -> None:
    seeds = prunable(12)
    source = {seed: tmp_path / f"{seed}.onnx" for seed in seeds}
    for seed, path in source.items():
        onnx.save_model(
            seeded(seed, is_common=True),
            path,
            save_as_external_data=is_apart,
            location=f"{path.name}.data",
            size_threshold=0,
        )
    before = {}
    for seed, path in source.items():
        state = cpd.run(STEPS, path)
        before[seed] = (unsigned(state.model), state.plan and state.plan.content["groups"])
    request.getfixturevalue("all_is_large")
    for seed, path in source.items():
        state = cpd.run(STEPS, path)
        assert any(isinstance(value, Lazy) for value in load(path)._data.values())
        assert state.verification is not None
        assert state.verification.passed
        assert (unsigned(state.model), state.plan and state.plan.content["groups"]) == before[seed]


@pytest.mark.usefixtures("all_is_large")
def test_pieces_compute_what_the_whole_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        path = tmp_path / "m.onnx"
        onnx.save_model(seeded(seed, is_common=True), path)
        model = load(path)
        shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
        feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(2)]
        session = open_model(model, optimise=False)
        for feed, outputs in zip(feeds, Piecewise(fold(model)).run_all(feeds), strict=True):
            for ours, whole in zip(outputs, execute(session, feed), strict=True):
                np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("all_is_large")
def test_pieces_have_the_input_shapes_of_the_analysis(tmp_path: Path) -> None:
    text = (
        "(float[N, S, 6] x, float[6, 8] w, float[56, 5] v, int64[2] s) => (float[N, 5] y) "
        "{ h = MatMul(x, w) a = Relu(h) r = Reshape(a, s) y = MatMul(r, v) }"
    )
    onnx.save_model(from_text(text, values={"s": [-1, 56]}), tmp_path / "m.onnx")
    state = cpd.run(
        "comb, score, allocate{macs=0.5}, prune, verify", tmp_path / "m.onnx", input_shapes={"x": (2, 7, 6)}
    )
    assert state.verification is not None
    assert state.verification.passed
    assert state.combed is not None
    again = fold_again(state.combed.folded, state.model)
    assert again.scope.values["y"].shape == (2, 5)
    assert again.input_shapes == state.combed.folded.input_shapes == {"x": (2, 7, 6)}
    assert not again.unknown


def test_data_stays_readable_when_its_file_is_replaced(tmp_path: Path, all_is_large: None) -> None:
    path = tmp_path / "m.onnx"
    text = (
        "(float[2, 40] x, float[40, 80] w, float[80, 50] v) => (float[2, 50] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    )
    onnx.save_model(from_text(text), path, save_as_external_data=True, location="m.data", size_threshold=0)
    model = load(path)
    values = model.array("w").copy()
    (tmp_path / "other").write_bytes(bytes(100_000))
    (tmp_path / "other").replace(tmp_path / "m.data")
    assert np.array_equal(model.array("w"), values)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing tells the peak of memory")
def test_memory_is_a_small_multiple_of_the_largest_tensor(tmp_path: Path) -> None:
    """Of a model of 400 MB, in a process of its own: pruned and verified below what the weights take."""
    path, width, layers = tmp_path / "big.onnx", 2000, MEGABYTES // 16
    side = tmp_path / "big.data"
    nodes, tensors = [], []
    with side.open("wb") as stream:
        for number in range(layers):
            values = np.random.default_rng(number).standard_normal((width, width), np.float32) / np.float32(45)
            tensor = TensorProto(name=f"w{number}", dims=values.shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", side.name), ("offset", stream.tell()), ("length", values.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            stream.write(values.tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, width]) for n in ("x0", f"x{layers}")]
    tensors.append(numpy_helper.from_array(np.zeros(1, np.float32), "unused"))
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    path.write_bytes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    script = (  # getrusage would count what this process takes as well
        "import sys; from cpd_onnx.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    line = [
        sys.executable,
        "-c",
        script,
        *plain(["prune", path, "-o", tmp_path / "small.onnx", "--json", tmp_path / "r.json"]),
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    code, kilobytes = done.stdout.split()[-2:]
    assert code == "0", done.stderr
    assert int(kilobytes) * 1024 < 0.75 * MEGABYTES * 1e6
