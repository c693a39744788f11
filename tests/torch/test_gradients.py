"""Gradients of every differentiable operator, on the official operator tests."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx.parser  # after the check for it
import torch
from onnx import NodeProto

from cpd_onnx.torch import import_model
from cpd_onnx.torch.analysis import is_structural, unsupported
from cpd_onnx.torch.registry import OPERATORS, find
from tests.support.models import operator_cases

LARGEST = 20_000
"""Elements of an input beyond which a test is left out; each operator has smaller ones."""
NOT_DIFFERENTIABLE = {
    ("NegativeLogLikelihoodLoss", 2): "torch has no gradient for weights of classes",
    ("SoftmaxCrossEntropyLoss", 2): "torch has no gradient for weights of classes",
    ("RoiAlign", 1): "torch has no gradient for regions",
}
NO_GRADIENT = {
    "Bernoulli": "random",
    "BitCast": "reads bits",
    "ConstantOfShape": "makes numbers",
    "EyeLike": "makes numbers",
    "Hardmax": "a step everywhere",
    "If": "its condition is all that it takes",
}


def differentiable(node: NodeProto) -> set[str]:
    """Names of the inputs that a gradient should reach."""
    found = find(node.domain, node.op_type)
    if found is None:
        return set(node.input)
    held = {*found.host, *found.frozen, *(slot for op, slot in NOT_DIFFERENTIABLE if op == node.op_type)}
    return {name for slot, name in enumerate(node.input) if name and slot not in held}


def usable(case: Any) -> list[int]:
    """Positions of the inputs to differentiate by; none where the test does not serve."""
    node, (inputs, outputs) = case.model.graph.node[0], case.data_sets[0]
    if len(case.model.graph.node) > 1 or not all(isinstance(a, np.ndarray) for a in (*inputs, *outputs)):
        return []
    if unsupported(case.model) or not any(a.dtype == np.float32 for a in outputs):
        return []
    if any(a.dtype in (np.uint16, np.uint32, np.uint64) for a in inputs):  # torch computes little with these
        return []
    names, wanted = [info.name for info in case.model.graph.input], differentiable(node)
    chosen = [k for k, a in enumerate(inputs) if a.dtype == np.float32 and names[k] in wanted]
    return chosen if 0 < min((inputs[k].size for k in chosen), default=0) <= LARGEST else []


def cases() -> dict[str, list[Any]]:
    found = defaultdict(list)
    for case in operator_cases():
        node = case.model.graph.node[0]
        if (find(node.domain, node.op_type) or is_structural(node)) and usable(case):
            found[node.op_type].append(case)
    return found


CASES = cases()


def moved(values: np.ndarray) -> torch.Tensor:
    """In double precision, a little off the places where functions have kinks, and no further from zero than one."""
    noise = np.random.default_rng(0).uniform(1e-3, 2e-2, values.shape)
    inside = (np.abs(values) <= 1).all()
    return torch.from_numpy(
        np.where(inside & (values > 0.5), values - noise, values + noise).astype(np.float64)
    ).contiguous()


@pytest.mark.parametrize("operator", sorted(CASES))
@pytest.mark.filterwarnings("ignore")
def test_gradients(operator: str) -> None:
    checked = [gradient_is_right(case) for case in CASES[operator]]
    assert any(checked) or operator in NO_GRADIENT


def gradient_is_right(case: Any) -> bool:
    """Compare the gradients of one test with differences; False if it has none."""
    chosen, inputs = usable(case), case.data_sets[0][0]
    if case.model.graph.node[0].op_type in NO_GRADIENT:
        return False
    module = import_model(case.model).double()
    tensors = [torch.from_numpy(np.array(array)) for array in inputs]
    tensors = [t.double() if t.dtype == torch.float32 else t for t in tensors]
    values = tuple(moved(inputs[k]).requires_grad_() for k in chosen)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = list(tensors)
        for k, value in zip(chosen, values, strict=True):
            given[k] = value
        floats = (o for o in module(*given) if o.is_floating_point() and o.requires_grad)
        return tuple(torch.where(o.isfinite(), o, 0.0) for o in floats)

    if not run(*values):
        return False
    assert torch.autograd.gradcheck(run, values, fast_mode=True, atol=1e-4, rtol=1e-3), case.name
    return True


def test_every_operator_that_has_a_gradient_is_checked() -> None:
    """What the official tests do not show of our table is no function of floats, or of another domain."""
    known = {name for domain, name in OPERATORS if domain in ("", "ai.onnx")}
    left = known - set(CASES) - set(NO_GRADIENT)
    print(sorted(left))
    assert len(set(CASES) - set(NO_GRADIENT)) >= 110


def test_a_row_that_is_masked_whole_has_no_gradient() -> None:
    """Softmax, IsNaN, Where: as exporters write attention with masks that may hide everything."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] x, bool[2,3] seen) => (float[2,3] y) '
        "<float low = {-inf}, float zero = {0}> "
        "{ s = Where(seen, x, low) p = Softmax(s) n = IsNaN(p) y = Where(n, zero, p) }"
    )
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (y,) = import_model(model)(x, torch.tensor([[True, False, True], [False, False, False]]))
    assert y[1].tolist() == [0.0, 0.0, 0.0]
    (y[0, 0] + y[1].sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert float(x.grad[0, 0]) > 0
    assert x.grad[1].tolist() == [0.0, 0.0, 0.0]
