"""One table says what operators are: it agrees with onnx's own, each of its properties is asked for, and no other says it.

A dictionary from operators to functions is a registration, as a decorator is: it says who handles an operator.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx.defs
import onnx.numpy_helper
import onnx.parser
import pytest

from cpd_onnx.ir.model import load
from cpd_onnx.ops.evaluate import EVALUATORS, Call
from cpd_onnx.ops.traits import MICROSOFT, Traits, operators_with, traits, traits_of, type_slot
from cpd_onnx.rules import RULES
from cpd_onnx.shapes.inference import fold

ROOT = Path(__file__).parents[2]
SOURCES = sorted({p.resolve() for folder in ("cpd_onnx", "passes") for p in (ROOT / folder).rglob("*.py")})
STANDARD = {schema.name: schema for schema in onnx.defs.get_all_schemas() if not schema.domain}
OPERATORS = {schema.name for schema in onnx.defs.get_all_schemas()} | {name for _, name in RULES}
ACTIVATIONS = {"Sigmoid", "Tanh"}
"""Values of an attribute of recurrent layers, which are no operators there."""


def names(node: ast.expr) -> Iterator[str]:
    """Operators among the elements of a literal, or the keys of one that says more of them than who handles them."""
    elements: list[ast.expr | None] = []
    if isinstance(node, ast.Set | ast.Tuple | ast.List):
        elements = [*node.elts]
    elif isinstance(node, ast.Dict) and any(isinstance(v, ast.Constant | ast.Set | ast.List) for v in node.values):
        elements = [*node.keys]
    elif isinstance(node, ast.Attribute) and node.attr == "split" and isinstance(node.value, ast.Constant):
        elements = [ast.Constant(word) for word in str(node.value.value).split()]
    for element in elements:
        inner = element.elts if isinstance(element, ast.Tuple) else [element]  # a domain and an operator
        yield from (c.value for c in inner if isinstance(c, ast.Constant) and c.value in OPERATORS)


def tables(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        found = set(names(node)) if isinstance(node, ast.expr) else set()
        if len(found - (ACTIVATIONS if path.name == "recurrent.py" else set())) > 1:
            yield f"{path.relative_to(ROOT)}:{node.lineno} {sorted(found)}"


@pytest.mark.parametrize(
    "text",
    [
        'X = {"Relu", "Tanh"}',
        'X = frozenset(["Relu", "Tanh"])',
        'node.op_type in ("Loop", "Scan")',
        'X = {"Relu": 1, "Tanh": 2}',
        'X = {("", "Relu"), ("", "Tanh")}',
        'X = "Relu Tanh".split()',
    ],
)
def test_the_scan_finds(text: str) -> None:
    found = [name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.expr) for name in names(node)]
    assert len(set(found)) == 2


def test_no_other_table_says_what_operators_are() -> None:
    rooms = [ROOT / "cpd_onnx" / room for room in ("ops", "rules")]
    others = [path for path in SOURCES if not any(path.is_relative_to(room) for room in rooms)]
    assert [table for path in others for table in tables(path)] == []


NAMED = {
    ("cpd_onnx/deploy/quantize.py", "QuantizeLinear"): "whether onnxruntime has quantised any activation",
    ("cpd_onnx/ir/differences.py", "Constant"): "the table lies above that room",
    ("cpd_onnx/ir/tensors.py", "Constant"): "the table lies above that room",
    ("cpd_onnx/proof/observing.py", "QuantizeLinear"): "of the two quantizers, only this one rounds",
    ("cpd_onnx/proof/unrounded.py", "Cast"): "rewrites its attribute `to`",
    ("cpd_onnx/proof/unrounded.py", "MatMulNBits"): "rewrites its attribute `accuracy_level`",
    ("cpd_onnx/runtime/sessions.py", "CumSum"): "positions are counted from a mask, which stays one",
    ("cpd_onnx/runtime/sessions.py", "OneHot"): "the number of its indices, a value of its second input",
    ("cpd_onnx/runtime/sessions.py", "Gather"): "the size of its table, along its attribute `axis`",
    ("cpd_onnx/shapes/origins.py", "Div"): "its arithmetic on sizes",
    ("cpd_onnx/shapes/origins.py", "Max"): "its arithmetic on sizes",
    ("cpd_onnx/shapes/origins.py", "Mul"): "its arithmetic on sizes",
    ("cpd_onnx/shapes/origins.py", "ReduceProd"): "its arithmetic on sizes",
    ("cpd_onnx/training/feed.py", "Conv"): "torch trains strided pointwise convolutions wrongly in one layout",
    ("cpd_onnx/training/refolding.py", "Conv"): "BatchNormalization is put back after the one layer it was folded into",
}
"""Comparisons with the name of an operator outside the rooms that define operators, and why each is no trait."""


def compared(tree: ast.AST) -> Iterator[str]:
    """Operators with whose names a value is compared."""
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        yield from (side.value for side in sides if isinstance(side, ast.Constant) and side.value in OPERATORS)


@pytest.mark.parametrize(
    "text", ['node.op_type == "Size"', '"Size" != kind', 'match kind:\n    case "Size":\n        pass']
)
def test_the_scan_finds_comparisons(text: str) -> None:
    assert list(compared(ast.parse(text))) == ["Size"]


def test_operators_are_compared_by_name_only_where_no_trait_says_it() -> None:
    rooms = [ROOT / "cpd_onnx" / room for room in ("ops", "rules", "torch")]
    others = [path for path in SOURCES if not any(path.is_relative_to(room) for room in rooms)]
    found = {
        (path.relative_to(ROOT).as_posix(), name) for path in others for name in compared(ast.parse(path.read_text()))
    }
    assert found == NAMED.keys()


def test_each_property_is_asked_for_and_some_operator_has_it() -> None:
    text = "".join(path.read_text() for path in SOURCES if path.name != "traits.py")
    asked = {f.name for f in fields(Traits) if f".{f.name}" in text or f'"{f.name}"' in text}
    assert {f.name for f in fields(Traits)} - asked == {"moved", "type_slot"} - asked
    for field in fields(Traits):
        if field.default is False:
            assert operators_with(field.name) | operators_with(field.name, MICROSOFT), field.name


def test_operators_are_known_by_their_names() -> None:
    for field in fields(Traits):
        if field.default is False:
            assert operators_with(field.name) <= STANDARD.keys(), field.name
            assert {(MICROSOFT, name) for name in operators_with(field.name, MICROSOFT)} <= RULES.keys() | {
                (MICROSOFT, name) for name in ("Pad", "Range")
            }


def test_truth_values_are_what_the_standard_says() -> None:
    def is_boolean(schema: onnx.defs.OpSchema) -> bool:
        return len(schema.outputs) == 1 and schema.outputs[0].types == {"tensor(bool)"}

    kinds = {name for name, schema in STANDARD.items() if is_boolean(schema)}
    assert operators_with("is_boolean") == kinds
    assert operators_with("compares") < operators_with("is_boolean")


def test_what_has_bodies_is_what_the_standard_says() -> None:
    graph = onnx.defs.OpSchema.AttrType.GRAPH
    found = {name for name, s in STANDARD.items() if any(a.type == graph for a in s.attributes.values())}
    assert found - {"SequenceMap"} == operators_with("has_bodies")


CALLS = {
    "Cast": ({"to": 7}, []), "Concat": ({"axis": 0}, [np.arange(6, 12).reshape(2, 3)]), "Expand": ({}, [np.array([2, 2, 3])]),
    "Flatten": ({}, []), "Gather": ({"axis": 1}, [np.array([2, 0])]), "Identity": ({}, []),
    "Reshape": ({}, [np.array([3, 2])]), "Slice": ({}, [np.array([1]), np.array([9]), np.array([1])]),
    "Split": ({"axis": 1, "split": [1, 2]}, []), "Squeeze": ({}, []), "Tile": ({}, [np.array([2, 1])]),
    "Transpose": ({}, []), "Unsqueeze": ({}, [np.array([0])]),
    "Where": ({}, [np.arange(6).reshape(2, 3), np.arange(6, 12).reshape(2, 3)]),
}  # fmt: skip  # a table


@pytest.mark.parametrize("name", sorted(operators_with("moves_elements")))
def test_what_moves_elements_makes_none(name: str) -> None:
    attributes, others = CALLS[name]
    inputs = [np.arange(6).reshape(2, 3), *others]
    inputs[0] = inputs[0] % 2 == 0 if name == "Where" else inputs[0]
    found = EVALUATORS[name](Call(attributes, 18), *inputs)
    given = {int(n) for slot in traits(name).carried(len(inputs)) for n in inputs[slot].ravel()}
    made = [int(n) for part in (found if isinstance(found, tuple) else (found,)) for n in part.ravel()]
    assert made
    assert set(made) <= given


def node(text: str) -> onnx.NodeProto:
    return onnx.parser.parse_node(text)


def test_both_spellings_of_the_default_domain_are_one() -> None:
    assert traits("Relu", "ai.onnx") == traits("Relu") == traits_of(node("y = Relu(x)"))
    assert traits("Relu").is_rectifier
    assert traits("Relu", MICROSOFT) == Traits()


@pytest.mark.parametrize("name", ["QLinearNobodyKnows", "QMoE", "QuantizeLinear", "DynamicQuantizeLSTM"])
def test_operators_of_no_row_round_if_their_names_say_so(name: str) -> None:
    for domain in ("", MICROSOFT, "qonnx.custom_op.general"):
        assert traits(name, domain).rounds_activations


def test_where_the_type_of_a_result_stands() -> None:
    whole = "y = com.microsoft.QGemm (a, s, z, b, t, u, c)"
    assert type_slot(node(whole)) == 1  # a float, as the scale is
    assert type_slot(node(whole.replace("c)", "c, v, w)"))) == 0  # an integer, as the data are
    assert type_slot(node("y = com.microsoft.QLinearConcat (s, z, a, b)")) == 2


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("QuantizeLinear (f, s, z)", onnx.TensorProto.UINT8),
        ("DequantizeLinear (a, s, z)", onnx.TensorProto.FLOAT),
        ("QGemm (a, s, z, b, s, z)", onnx.TensorProto.FLOAT),
        ("QGemm (a, s, z, b, s, z, c, s, z)", onnx.TensorProto.UINT8),
    ],
)
def test_shape_inference_knows_the_type_of_what_onnxruntime_adds(call: str, kind: int) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[2, 4] f, uint8[2, 4] a) => (y) <float s = {{1}}, uint8 z = {{1}}, uint8[4, 3] b, int32[3] c>
        {{ y = com.microsoft.{call} }}""")
    del model.graph.value_info[:]
    for name, dims, dtype in (("b", (4, 3), np.uint8), ("c", (3,), np.int32)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(dims, dtype), name))
    assert fold(load(model)).scope.values["y"].dtype == kind


@pytest.mark.parametrize("name", ["Swish", "Mish", "Celu", "Softsign", "ThresholdedRelu"])
def test_activations_are_known_for_such(name: str) -> None:
    assert traits(name).is_activation
