"""Groups that alone lose channels: what consumes them is fitted anew, and the outputs are compared."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy.quantize import Quantization, quantize
from cpd_onnx.fitting.divergence import Divergence
from cpd_onnx.fitting.units import units_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.repair import RepairOptions
from cpd_onnx.passes.sensitivity import narrowed
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime import stream as streams
from cpd_onnx.scores import alone as module
from cpd_onnx.scores.alone import Alone

RESIDUAL = """residual (float[N, 3, 6, 6] x) => (float[N, 5] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
  r = Relu(a)
  c = Conv <pads = [1, 1, 1, 1]> (r, w1, b1)
  d = Relu(c)
  e = Conv (d, w2, b2)
  f = Add(e, r)
  g = Conv <group = 12, pads = [1, 1, 1, 1]> (f, w3)
  h = Conv <group = 2> (g, w4)
  p = GlobalAveragePool(h)
  q = Flatten(p)
  y = Gemm(q, w5, b5)
}"""
CHAIN = """chain (float[N, 3, 6, 6] x) => (float[N, 5] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
  r = Relu(a)
  c = Conv <pads = [1, 1, 1, 1]> (r, w1, b1)
  d = Relu(c)
  p = GlobalAveragePool(d)
  q = Flatten(p)
  y = Gemm(q, w5, b5)
}"""
SHAPES = {
    "w0": (12, 3, 3, 3), "b0": (12,), "w1": (16, 12, 3, 3), "b1": (16,), "w2": (12, 16, 1, 1), "b2": (12,),
    "w3": (12, 1, 3, 3), "w4": (16, 6, 1, 1), "w5": (16, 5), "b5": (5,),
}  # fmt: skip  # a table


def model(text: str) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng, read = np.random.default_rng(0), {name for node in proto.graph.node for name in node.input}
    weights = {name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) for name, shape in SHAPES.items()}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items() if name in read
    )
    return load(proto)


def images(count: int, seed: int = 1) -> ArraySource:
    """Noise with a common part, so that channels can replace each other."""
    rng = np.random.default_rng(seed)
    return ArraySource(
        {"x": (rng.standard_normal((count, 3, 6, 6)) + rng.standard_normal((count, 1, 1, 6))).astype("f")}
    )


def measured(combed: Combed, count: int = 96) -> dict[str, tuple[float, float, float]]:
    """Divergence of each group without a third of its channels, that after a repair of it alone, and that without."""
    measure = Divergence(combed.folded.model, images(64, 2), 64)
    feeds = list(images(count).batches(8))
    wide = [group for group in combed.groups if len(group) > 2]
    gone = {group.id: np.arange(len(group) // 3) for group in wide}
    found = dict(Alone(combed, feeds, measure, 0).diverged(gone))
    options = RepairOptions(samples=count)
    result = {}
    for group in wide:
        small = rewrite(combed, KeepMask(combed.atoms, group.channels[gone[group.id]])).model
        repaired = narrowed(combed, group, gone[group.id], images(count), options)
        values = (found[group.id].mean(), measure(repaired).mean(), measure(small).mean())
        result[group.name] = tuple(map(float, values))
    return result


def test_a_narrowed_group_loses_what_its_repair_loses() -> None:
    found = measured(comb(model(CHAIN)))
    assert len(found) == 2
    for alone, repaired, cut in found.values():
        assert alone == pytest.approx(repaired, rel=0.5)
        assert alone < cut


def test_several_consumers_of_a_group_are_fitted_to_the_original() -> None:
    """A group that passes a residual connection, a depthwise and a grouped convolution."""
    found = measured(comb(model(RESIDUAL)))
    assert len(found) >= 2
    for alone, repaired, cut in found.values():
        assert alone < 2 * repaired + 1e-6
        assert alone <= cut


def test_a_quantised_consumer_is_fitted_in_its_steps() -> None:
    quantised = quantize(model(CHAIN), images(64), Quantization())
    found = measured(comb(quantised))
    assert found
    for alone, _, cut in found.values():
        assert 0 < alone < cut


def test_few_samples_do_not_make_a_narrowed_model_worse() -> None:
    for alone, _, cut in measured(comb(model(CHAIN)), 2).values():
        assert alone < 1.5 * cut


@pytest.mark.parametrize("most", [1, 1 << 28])
def test_the_moments_that_are_held_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    combed = comb(model(RESIDUAL))
    before = measured(combed)
    monkeypatch.setattr(module, "_MOMENT_BYTES", most)
    monkeypatch.setattr(module, "HELD_BYTES", most)
    after = measured(combed)
    assert after.keys() == before.keys()
    assert [values[0] for values in after.values()] == pytest.approx(
        [values[0] for values in before.values()], rel=1e-3
    )


def test_a_narrowed_model_runs_from_the_first_node_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    combed = comb(model(CHAIN))
    runs: list[int] = []
    plain = streams.Parts.make

    def make(self: streams.Parts, outputs: list[str], start: int) -> object:
        runs.append(start)
        return plain(self, outputs, start)

    monkeypatch.setattr(streams.Parts, "make", make)
    measure = Divergence(combed.folded.model, images(16, 2), 16)
    late = next(group for group in combed.groups if any(m.weight.name == "w5" for m in combed.members(group)))
    ((_, values),) = Alone(combed, list(images(16).batches(8)), measure, 0).diverged({late.id: np.arange(4)})
    positions = {unit.weight: unit.position for unit in units_of(combed.folded).found}
    assert runs[-1] == positions["w1"]
    assert len(values) == 16
