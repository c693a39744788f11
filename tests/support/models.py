"""Models for the tests: from ONNX text, and from the official operator tests with all axes made prunable."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64, TensorProto.FLOAT16: np.float16}


def in_constants(model: ModelProto) -> ModelProto:
    """Return the model with each initializer in a Constant node."""
    made = ModelProto()
    made.CopyFrom(model)
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in made.graph.initializer]
    nodes += list(made.graph.node)
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(nodes)
    return made


def from_text(
    graph: str, *, opset: int = 17, ir: int = 8, values: dict[str, Any] | None = None, functions: str = ""
) -> ModelProto:
    """Return a model whose inputs not named x… become initializers, with the given values or random ones."""
    text = f'<ir_version: {ir}, opset_import: ["": {opset}, "com.microsoft": 1, "local": 1]> agraph {graph} {functions}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    inputs = list(model.graph.input)
    del model.graph.input[:]
    for info in inputs:
        if info.name.startswith("x"):
            model.graph.input.append(info)
            continue
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if values and info.name in values:
            array = np.asarray(values[info.name], dtype).reshape(shape)
        elif np.issubdtype(dtype, np.integer):
            array = rng.integers(1, 50, shape).astype(dtype)
        else:
            array = (0.5 + rng.random(shape) if len(shape) < 2 else rng.standard_normal(shape)).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, info.name))
    return model


class Mixer:
    """Multiplies every axis of a tensor by a random matrix, so that no axis is frozen by an input or output."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def mix(self, source: str, target: str, shape: tuple[int, ...], dtype: Any, tag: str) -> None:
        """Return the nodes that compute `target` from `source`."""
        axes = [axis for axis, size in enumerate(shape) if size >= 2]
        for axis in axes:
            size, rank = shape[axis], len(shape)
            weight = (self.rng.standard_normal((size, size)) / np.sqrt(size)).astype(dtype)
            self.weights.append(numpy_helper.from_array(weight, f"{tag}_w{axis}"))
            last = target if axis == axes[-1] else f"{tag}_m{axis}"
            perm = [i for i in range(rank) if i != axis] + [axis]
            back = [int(i) for i in np.argsort(perm)]
            self.nodes += [
                helper.make_node("Transpose", [source], [f"{tag}_t{axis}"], perm=perm),
                helper.make_node("MatMul", [f"{tag}_t{axis}", f"{tag}_w{axis}"], [f"{tag}_p{axis}"]),
                helper.make_node("Transpose", [f"{tag}_p{axis}"], [last], perm=back),
            ]
            source = last


def set_free(case: Any, *, constants: bool, seed: int = 0) -> ModelProto | None:
    """Return the model of an official operator test between random matrices on all axes of its float tensors.

    With `constants` some float inputs become weights. None if the test has no suitable float tensors.
    """
    source, (inputs, outputs) = case.model, case.data_sets[0]
    before, after = Mixer(seed), Mixer(seed + 1)
    weights: list[TensorProto] = []
    made_inputs, made_outputs = [], []
    for number, (info, value) in enumerate(zip(source.graph.input, inputs, strict=False)):
        if not isinstance(value, np.ndarray):
            return None
        kind = info.type.tensor_type.elem_type
        becomes_weight = constants and number and before.rng.random() < 0.7
        if _is_mixable(kind, value) and not becomes_weight:
            made_inputs.append(helper.make_tensor_value_info(f"{info.name}_in", kind, value.shape))
            before.mix(f"{info.name}_in", info.name, value.shape, FLOATS[kind], f"i_{info.name}")
        else:
            weights.append(numpy_helper.from_array(value, info.name))
    for info, value in zip(source.graph.output, outputs, strict=False):
        if not isinstance(value, np.ndarray):
            return None
        kind = info.type.tensor_type.elem_type
        if _is_mixable(kind, value):
            after.mix(info.name, f"{info.name}_out", value.shape, FLOATS[kind], f"o_{info.name}")
            made_outputs.append(helper.make_tensor_value_info(f"{info.name}_out", kind, value.shape))
        else:
            made_outputs.append(info)
    if not made_inputs:
        return None
    nodes = [*before.nodes, *source.graph.node, *after.nodes]
    graph = helper.make_graph(nodes, "free", made_inputs, made_outputs, [*weights, *before.weights, *after.weights])
    made = helper.make_model(graph, opset_imports=source.opset_import, ir_version=min(10, source.ir_version))
    made.functions.extend(source.functions)
    return made


def _is_mixable(kind: int, value: np.ndarray) -> bool:
    return kind in FLOATS and value.ndim >= 1 and max(value.shape) >= 2 and 0 not in value.shape


@functools.cache
def operator_cases() -> list[Any]:
    """Return the official operator tests whose opset onnxruntime supports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some casts of the corpus overflow on purpose
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    return [c for c in cases if all(o.version <= 26 for o in c.model.opset_import if o.domain in ("", "ai.onnx"))]
