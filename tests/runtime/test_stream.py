"""Streamed runs: what is looked at, what is held, and the order of the batches."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.ir.model import Model, load
from cpd_onnx.rewrite.rewriter import resized
from cpd_onnx.runtime import stream as streams
from cpd_onnx.runtime import threads
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.runtime.stream import Stop, Stream, apart, batch_size, cuts_before, first_difference
from cpd_onnx.runtime.threads import in_order

TEXT = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4, 8, 8] x) => (float[N, 6] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, w0)
  r = Relu(a)
  b = Conv <pads = [1, 1, 1, 1]> (r, w1)
  s = Add(b, r)
  m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (s)
  c = Conv (m, w2)
  p = GlobalAveragePool(c)
  q = Flatten(p)
  y = MatMul(q, w3)
}"""


def model() -> Model:
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    shapes = {"w0": (12, 4, 3, 3), "w1": (12, 12, 3, 3), "w2": (5, 12, 1, 1), "w3": (5, 6)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return load(proto)


def feeds(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 4, 8, 8)).astype(np.float32)} for _ in range(count)]


def whole(original: Model, names: list[str]) -> list[list[np.ndarray]]:
    proto = original.complete_proto()
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return [execute(open_model(load(proto)), feed)[1:] for feed in feeds()]


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_looks_see_the_tensors_of_the_whole_model_whatever_is_held(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(streams, "HELD_BYTES", held)
    original = model()
    stream = Stream(comb(original).folded, original, feeds())
    got: list[list[np.ndarray]] = [[], [], []]

    def look(stop: int, batch: int, tensors: streams.Tensors) -> np.ndarray:
        return np.array(tensors["ac"[stop]])

    # First both in one run, then the second alone from a cut, which does not hold the first any more.
    for results in stream.run([Stop(0, ("a",)), Stop(5, ("c",))], look):
        for place, result in enumerate(results):
            got[place].append(result)
    for (result,) in stream.looks([Stop(5, ("c",))], lambda stop, *of: look(1, *of), cut=4).own:
        got[2].append(result)
    assert stream.alive(4) == ("m",)
    for batch, (a, c) in enumerate(whole(original, ["a", "c"])):
        for array, want in zip((got[0], got[1], got[2]), (a, c, c), strict=True):
            np.testing.assert_allclose(array[batch], want, rtol=1e-5, atol=1e-4)
    with pytest.raises(KeyError):
        list(stream.run([Stop(5, ("x",))], lambda stop, batch, tensors: tensors["x"]))


def test_weights_are_read_when_their_piece_runs() -> None:
    original = model()
    stream = Stream(comb(original).folded, original, feeds())
    stream.looks([], lambda *of: None, cut=1)
    original.set_array("w1", np.zeros_like(original.array("w1")))
    looks = stream.run([Stop(2, ("b",))], lambda stop, batch, tensors: float(np.abs(tensors["b"]).max()))
    assert looks == [(0.0,), (0.0,), (0.0,)]


def test_cuts_are_small_and_everything_between_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original = model()
    stream = Stream(comb(original).folded, original, feeds())
    assert stream.alive(1) == ("r",)
    assert stream.cut_bytes(1) == 4 * 6 * 12 * 64
    positions = [0, 2, 5, 8]  # of the three convolutions and the product
    assert cuts_before(positions, stream) == {1: 1, 2: 4, 3: 7}
    monkeypatch.setattr(streams, "HELD_BYTES", 4 * 6 * 12 * 16)
    assert cuts_before(positions, stream) == {2: 4, 3: 7}
    monkeypatch.setattr(streams, "HELD_BYTES", 0)
    monkeypatch.setattr(streams, "_MOST_LOOKS", 2)
    assert cuts_before(positions, stream) == {2: 4}


def test_results_come_in_the_order_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 4)

    def slow(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        return number

    assert list(in_order(slow, 10)) == list(range(10))
    assert list(in_order(slow, 0)) == []


def test_batches_of_large_tensors_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = comb(model()).folded
    assert batch_size(folded, 32) == 32
    monkeypatch.setattr(streams, "BATCH_BYTES", 3 * 4 * 12 * 64)
    assert batch_size(folded, 32) == 3
    monkeypatch.setattr(streams, "BATCH_BYTES", 1)
    assert batch_size(folded, 32) == 1


def test_an_array_in_pages_of_its_own_is_the_same() -> None:
    array = np.arange(1 << 15, dtype=np.float32).reshape(2, -1)
    np.testing.assert_array_equal(apart(array), array)
    assert apart(array).base is not None


def test_a_copy_continues_from_the_cut_before_the_first_difference() -> None:
    original = model()
    combed = comb(original)
    group = next(group for group in combed.groups if any(m.weight.name == "w3" for m in combed.members(group)))
    small = resized(combed, KeepMask(combed.atoms, group.channels[:2]))
    first = first_difference(combed.folded, small)
    assert combed.folded.scope.nodes[first].output[0] == "c"
    assert first_difference(combed.folded, original.copy()) == len(combed.folded.scope.nodes)
    stream = Stream(combed.folded, original, feeds())
    stream.move(first - 1, 1 << 30)
    assert stream.alive(first - 1) == ("m",)
    made = [y for (y,) in stream.of(small).run([Stop(8, ("y",))], lambda stop, batch, tensors: tensors["y"])]
    for array, feed in zip(made, feeds(), strict=True):
        np.testing.assert_allclose(array, execute(open_model(small), feed)[0], rtol=1e-5, atol=1e-4)


def test_a_cut_that_holds_too_much_is_not_moved() -> None:
    stream = Stream(comb(model()).folded, model(), feeds())
    stream.move(4, 1)
    (held,) = {tuple(sorted(tensors)) for tensors in stream._held}
    assert held == ("x",)


def test_what_a_cut_holds_already_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(comb(model()).folded, model(), feeds())
    stream.keep_alive({"x": 8})
    copies: list[np.ndarray] = []
    monkeypatch.setattr(streams, "apart", lambda array: (copies.append(array), array)[1])
    stream.move(1, 1 << 30)
    stream.move(4, 1 << 30)
    assert sorted({array.shape[1] for array in copies}) == [12]


RESIZED = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, L] x) => (float[M, 3, 2] y)
{
  a = Conv(x, w0)
  s = Shape(x)
  n = Gather(s, one)
  k = Mul(n, one)
  q = Equal(k, three)
  t = If (q) <
    then_branch = p () => (float[] u) { u = Identity(w1) },
    else_branch = e () => (float[] v) {
      f = Shape <end = 2> (w1)
      i = Unsqueeze(k, zero)
      z = Concat <axis = 0> (f, i)
      c = Cast <to = 7> (z)
      v = Resize <mode = "linear"> (w1, , , c)
    }
  >
  y = MatMul(a, t)
}"""


SIZED = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 2] x) => (float[M, 3, 2] y)
{
  a = Conv(x, w0)
  s = Shape <start = 2> (x)
  q = Mul(s, s)
  f = Shape <end = 2> (w1)
  z = Concat <axis = 0> (f, q)
  t = Resize <mode = "linear"> (w1, , , z)
  k = Shape(t)
  y = Slice(t, zero, one)
}"""


@pytest.mark.parametrize(("text", "place"), [(RESIZED, 4), (SIZED, 2)])
def test_parts_know_what_sizes_are(text: str, place: int) -> None:
    """onnxruntime refuses a Resize, even in a branch that never runs, if it only knows a part of the sizes."""
    proto = onnx.parser.parse_model(text)
    arrays = {
        "w0": np.ones((3, 3, 1), np.float32), "w1": np.ones((1, 3, 2), np.float32),
        "zero": np.zeros(1, np.int64), "one": np.array(1), "three": np.array(3),
    }  # fmt: skip  # a table
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    original = load(proto)
    feed = {"x": np.ones((2, 3, 3 if text is RESIZED else 2), np.float32)}
    stream = Stream(comb(original).folded, original, [feed])
    stops = [Stop(place, ("q",)), Stop(5, ("t",))]
    ((_, found),) = stream.run(stops, lambda stop, batch, tensors: np.array(tensors["qt"[stop]]))
    assert np.array_equal(found[..., :2], arrays["w1"])
