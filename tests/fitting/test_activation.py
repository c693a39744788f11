"""Activations behind fitted tensors, in the forms in which exporters write them, and fits that see through them."""

from __future__ import annotations

import numpy as np
import pytest

from cpd_onnx.channels.combing import comb
from cpd_onnx.fitting.activation import Activation, activation_of
from cpd_onnx.fitting.graph import Graph
from cpd_onnx.fitting.problem import Block, Problem
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.runtime.shards import Divided
from tests.support.models import from_text

CONV = "t = Conv(x, w, b)"
NONE: dict[str, object] = {}
FORMS = {
    "Sigmoid": ("y = Sigmoid(t)", "", NONE),
    "SiLU of two nodes": ("s = Sigmoid(t) y = Mul(t, s)", "", NONE),
    "GELU of five nodes": (
        "d = Div(t, root) e = Erf(d) a = Add(e, one) m = Mul(t, a) y = Mul(m, half)",
        ", float root, float[1] one, float[1,1,1,1] half",
        {"root": np.sqrt(2), "one": 1, "half": 0.5},
    ),
    "GELU by tanh": (
        "c = Pow(t, three) k = Mul(c, k0) a = Add(t, k) s = Mul(a, k1) h = Tanh(s) p = Add(h, one) q = Mul(half, p)"
        " y = Mul(t, q)",
        ", int64 three, float k0, float k1, float one, float half",
        {"three": 3, "k0": 0.044715, "k1": np.sqrt(2 / np.pi), "one": 1, "half": 0.5},
    ),
    "HardSwish": ("y = HardSwish(t)", "", NONE),
    "LeakyRelu": ("y = LeakyRelu <alpha = 0.1> (t)", "", NONE),
    "a slope for each channel": ("y = PRelu(t, slope)", ", float[6,1,1] slope", {"slope": np.linspace(0, 0.5, 6)}),
    "behind an Identity": ("i = Identity(t) y = Elu(i)", "", NONE),
    "in a contrib operator": ("y = com.microsoft.QuickGelu <alpha = 1.702> (t)", "", NONE),
}
NOT_FOUND = {
    "none": "y = Softmax <axis = 1> (t)",
    "another user": "s = Sigmoid(t) p = GlobalAveragePool(t) y = Mul(s, p)",
    "two ends": "s = Sigmoid(t) c = Tanh(t) p = GlobalAveragePool(s) y = Mul(c, p)",
    "with another tensor": "y = Mul(t, x2)",
    "a step": "y = Round(t)",
    "another element type": "y = Cast <to = 10> (t)",
}


def unit_in(
    body: str, inputs: str, values: dict[str, object], out: str = "float", node: str = CONV
) -> tuple[Graph, Unit]:
    """Return a graph with one convolution, and the unit of its weight."""
    text = f"(float[N,4,5,5] x, float[N,6,5,5] x2, float[6,4,1,1] w, float[6] b{inputs}) => ({out}[N,6,5,5] y) {{ {node} {body} }}"
    model = load(from_text(text, values=values))
    folded = comb(model).folded
    (unit,) = units_of(folded, model).found
    return Graph(folded, model), unit


@pytest.mark.parametrize("form", FORMS)
def test_an_activation_is_found_in_the_forms_of_exporters(form: str) -> None:
    body, inputs, values = FORMS[form]
    graph, unit = unit_in(body, inputs, values)
    activation = activation_of(graph, unit)
    assert activation is not None
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 5, 5)).astype(np.float32)
    model = graph.model.complete_proto()
    model.graph.output.add().name = "t"
    wanted, target = execute(open_model(load(model)), {"x": x, "x2": np.zeros((2, 6, 5, 5), np.float32)})
    every = np.arange(5 * 5)
    found = activation(unit.linear.targets(target, every))
    np.testing.assert_allclose(found, unit.linear.targets(wanted, every), rtol=1e-5, atol=1e-6)


def test_an_operator_that_takes_vectors_alone_is_an_activation_too() -> None:
    """As the bias of BiasGelu, which onnxruntime's optimiser makes of an addition and a GELU."""
    text = "(float[N,3,4] x, float[4,6] w, float[6] b) => (float[N,3,6] y) { t = MatMul(x, w) y = com.microsoft.BiasGelu(t, b) }"
    model = load(from_text(text))
    folded = comb(model).folded
    (unit,) = units_of(folded, model).found
    activation = activation_of(Graph(folded, model), unit)
    assert activation is not None
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    (wanted,) = execute(open_model(model), {"x": x})
    made = (x.reshape(-1, 4) @ model.array("w"))[None]
    np.testing.assert_allclose(activation(made), wanted.reshape(1, -1, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", NOT_FOUND)
def test_no_activation_is_found_where_anything_else_takes_the_target(case: str) -> None:
    graph, unit = unit_in(NOT_FOUND[case], "", {}, "float16" if "type" in case else "float")
    assert activation_of(graph, unit) is None


def test_no_activation_is_found_where_its_input_is_an_output_of_the_model() -> None:
    graph, unit = unit_in("s = Sigmoid(y)", "", {}, node="y = Conv(x, w, b)")
    assert activation_of(graph, unit) is None


def problem_of(activation: Activation | None, bounds: tuple[float, float], rounds: int) -> Problem:
    """A fit to targets that are linear in the features but for where activations are flat."""
    rng = np.random.default_rng(0)
    truth = 3 * rng.standard_normal((1, 8, 5))
    blocks = []
    for _ in range(4):
        rows = rng.standard_normal((1, 512, 8)).astype(np.float32)
        wanted = rows @ truth.astype(np.float32)
        blocks.append(Block(rows, np.where(wanted < -4, -np.square(wanted), wanted)))
    ones = np.ones(5)
    return Problem(
        Divided.among(blocks), 1, 0 * truth, ones, 0 * ones, False, bounds, 1e-6, rounds, activation=activation
    )


def error_after(activation: Activation | None, bounds: tuple[float, float], rounds: int) -> float:
    problem = problem_of(activation, bounds, rounds)
    return problem.error(*problem.at(problem.ridge))


def test_a_fit_lowers_the_error_behind_the_activation() -> None:
    graph, unit = unit_in(*FORMS["SiLU of two nodes"])
    silu, free = activation_of(graph, unit), (-np.inf, np.inf)
    assert error_after(silu, free, 8) < 0.3 * error_after(silu, free, 0)


def test_a_few_rounds_reach_what_many_do() -> None:
    """Each round extrapolates the change of the one before."""
    few, many, none = (error_after(None, (0.0, np.inf), rounds) for rounds in (8, 200, 0))
    assert few - many < 0.1 * (none - many)


def test_a_weight_is_fitted_before_an_activation_that_is_not_defined_everywhere() -> None:
    graph, unit = unit_in("y = Log(t)", "", {})
    log = activation_of(graph, unit)
    assert log is not None
    problem = problem_of(log, (-np.inf, np.inf), 8)
    problem.start = problem.start + np.random.default_rng(1).standard_normal(problem.start.shape)
    solution = problem.solved()
    assert solution is not None
    assert np.isfinite(solution.matrix).all()
    assert solution.after < solution.before
