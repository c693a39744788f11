"""Which operators compute in 8-bit integers: the minimum cut, and the choice by measured times and by the answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from onnx import TensorProto

from cpd_onnx.budget.allocation import Prices
from cpd_onnx.budget.latency import CostTable, KernelTime, LatencyProbe, load_table, measure_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy import precision
from cpd_onnx.deploy.precision import Halves, Precision, _Cut, fastest, whole
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Model
from cpd_onnx.runtime.bench import Setting
from tests.support.machine import MadeUp, stack
from tests.support.models import from_text

NODES = ("a", "b", "c", "d", "e")
MIXED = (
    "(float[N, 3, 12, 12] x, float[8, 3, 3, 3] w, float[8, 8, 3, 3] u, float[8, 4] v) => (float[N, 4] y) "
    "{ a = Conv(x, w) b = Sigmoid(a) c = Conv(b, u) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, v) }"
)


def price(
    integers: set[str],
    times: dict[str, tuple[float, float]],
    tensors: list[tuple[str | None, tuple[str | None, ...], float]],
) -> float:
    """The milliseconds of a choice, as its definition says."""
    total = sum(pair[node in integers] for node, pair in times.items())
    for maker, readers, ms in tensors:
        total += ms * any((reader in integers) != (maker in integers) for reader in readers)
    return total


@pytest.mark.parametrize("seed", range(40))
def test_the_cut_is_the_least_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = {node: (float(rng.integers(0, 20)), float(rng.integers(0, 20))) for node in NODES}
    tensors: list[tuple[str | None, tuple[str | None, ...], float]] = []
    for place, maker in enumerate((None, *NODES)):
        later = [node for node in NODES[place:] if rng.random() < 0.5]
        ends = [None] if rng.random() < 0.3 else []
        tensors.append((maker, (*later, *ends), float(rng.integers(0, 9))))
    cut = _Cut(NODES)
    for node, pair in times.items():
        cut.pay(node, *pair)
    for tensor in tensors:
        cut.convert(*tensor)
    subsets = itertools.chain.from_iterable(itertools.combinations(NODES, count) for count in range(6))
    least = min(price(set(each), times, tensors) for each in subsets)
    assert price(set(cut.integer()), times, tensors) == least


def test_times_of_seconds_are_told_apart() -> None:
    cut = _Cut(NODES[:2])
    cut.pay("a", 9e3, 2e3)
    cut.pay("b", 5e3, 9e3)
    cut.convert("a", ("b", None), 1e3)
    assert cut.integer() == {"a"}


def is_half(model: Model) -> bool:
    """Return whether a model computes in 16-bit floats."""
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)


class Timed(LatencyProbe):
    """A machine on which each kernel takes a millisecond, and some operators another time."""

    takes: ClassVar[dict[str, float]] = {}
    halves = 1.0
    """Factor to the time of a model in 16-bit floats."""

    def profile(self, model: Model, nodes: object = None) -> tuple[dict[str, KernelTime], float, float]:
        integers = precision._integer_nodes(model)
        times = {}
        for node in model.graph.node:
            is_conversion = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            kind = f"int8 {node.op_type}" if node.name in integers else node.op_type
            name = f"{node.input[0]}_{node.op_type}" if is_conversion else node.name or node.output[0]
            is_weight = is_conversion and model.has(node.input[0])
            ms = 0.1 * (not is_weight) if is_conversion else self.takes.get(kind, 1.0)
            times[name] = KernelTime(node.op_type, ms, ())
        total = sum(kernel.ms for kernel in times.values()) * (self.halves if is_half(model) else 1.0)
        return times, total, total

    def ratio_of(self, model: Model, seconds: float = 2.0) -> float:
        return self.profile(model)[1] / self.profile(self.combed.folded.original)[1]


def on(machine: dict[str, float]) -> tuple[Timed, ArraySource]:
    made = Timed(comb(from_text(MIXED)), Setting())
    made.takes = machine  # type: ignore[misc]
    samples = np.random.default_rng(0).standard_normal((32, 3, 12, 12), np.float32)
    return made, ArraySource({"x": samples})


def float_operators(found: Precision, model: Model) -> set[str]:
    return {node.op_type for node in model.graph.node if node.output[0] in found.floats}


def test_an_operator_that_is_slow_in_integers_stays_float() -> None:
    machine, source = on({"int8 Conv": 0.2, "int8 MatMul": 0.2, "int8 Sigmoid": 30.0, "int8 Sum": 0.1})
    found = fastest(machine, source)
    assert found is not None
    model = machine.combed.folded.original
    assert "Sigmoid" in float_operators(found, model)
    assert "Conv" not in float_operators(found, model)
    assert found.latency < machine.ratio_of(whole(model, source)(model))
    quantised = {
        node.op_type for node in found(model).graph.node if node.name in precision._integer_nodes(found(model))
    }
    assert "Conv" in quantised
    assert "Sigmoid" not in quantised


def test_integers_that_are_slower_everywhere_are_not_chosen() -> None:
    machine, source = on(
        {f"int8 {kind}": 3.0 for kind in ("Conv", "Sigmoid", "GlobalAveragePool", "MatMul", "Flatten")}
    )
    assert fastest(machine, source) is None


def loss_of(operator: str, machine: Timed) -> Callable[[Model], float]:
    """A loss of 0.3 for each node of an operator that computes in integers."""

    def loss(model: Model) -> float:
        integers = precision._integer_nodes(model)
        return 0.3 * sum(node.op_type == operator and node.name in integers for node in model.graph.node)

    return loss


def test_what_loses_too_much_stays_float() -> None:
    machine, source = on({"int8 Conv": 0.2, "int8 MatMul": 0.9})
    loss = loss_of("MatMul", machine)
    found = fastest(machine, source, loss=loss, most=0.1)
    assert found is not None
    model = machine.combed.folded.original
    assert loss(found(model)) == 0
    assert "Conv" not in float_operators(found, model)


def test_nothing_is_converted_where_everything_loses_too_much() -> None:
    machine, source = on({"int8 Conv": 0.2, "int8 MatMul": 0.2})
    assert fastest(machine, source, loss=lambda model: 1.0, most=0.1) is None


@pytest.mark.parametrize(("halves", "most", "is_chosen"), [(0.1, 0.1, True), (0.1, 0.0, False), (0.9, 0.1, False)])
def test_halves_are_chosen_where_they_are_fastest_and_lose_little(halves: float, most: float, is_chosen: bool) -> None:
    machine, source = on({"int8 Conv": 0.2, "int8 MatMul": 0.2, "int8 Sigmoid": 30.0, "int8 Sum": 0.1})
    machine.halves = halves
    found = fastest(machine, source, loss=lambda model: 0.05 * is_half(model), most=most)
    assert isinstance(found, Halves if is_chosen else Precision)
    assert is_half(found(machine.combed.folded.original)) == is_chosen


def test_a_model_that_cannot_be_quantised_may_have_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedError("it cannot be quantised")

    machine, source = on({})
    machine.halves = 0.5
    monkeypatch.setattr(precision, "whole", refuse)
    assert isinstance(fastest(machine, source), Halves)


def test_a_quantised_model_is_refused() -> None:
    machine, source = on({})
    model = machine.combed.folded.original
    again = whole(model, source)(model)
    with pytest.raises(UnsupportedError, match="quantised already"):
        whole(again, source)


class Halved(MadeUp):
    """The made-up machine, on which models take half as long once they are converted."""

    def profile(self, model: Model, nodes: object = None) -> tuple[dict[str, KernelTime], float, float]:
        times, ms, original = super().profile(model)
        is_converted = model.proto.doc_string == "converted"
        factor = 0.5 if is_converted else 1.0
        times = {name: KernelTime(kernel.operator, factor * kernel.ms, kernel.sizes) for name, kernel in times.items()}
        return times, factor * ms, original


def converted(model: Model) -> Model:
    made = model.copy()
    made.proto.doc_string = "converted"
    return made


@pytest.fixture(scope="module")
def table() -> CostTable:
    return measure_table(Halved(comb(stack()), Setting(), converted))


def test_a_cost_table_of_converted_models_relates_them_to_the_original(table: CostTable) -> None:
    combed = comb(stack())
    prices = Prices(combed, ["latency"], table=table)
    assert table.is_converted
    assert prices.full("latency") == table.ms
    assert prices.cost("latency", prices._whole) == pytest.approx(0.5 * table.ms, rel=0.1)


def test_a_cost_table_says_whether_models_were_converted(table: CostTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    plain = measure_table(Halved(comb(stack()), Setting()))
    assert not plain.is_converted
