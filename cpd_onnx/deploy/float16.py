"""Conversion to 16-bit floats, of the weights alone or of the whole model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cpd_onnx.deploy.converting import (
    Notify,
    embedded,
    ignore,
    quantised_node,
    quiet,
    require_one_message,
    tensors_of,
    tidied,
    translate_tool_errors,
    valid,
)
from cpd_onnx.errors import TargetError, UnsupportedError
from cpd_onnx.ir.model import Array, Model, element_type, graphs_of
from cpd_onnx.ops.traits import traits_of

HALVES = ("float16", "bfloat16")
"""16-bit float types."""

OPSET = 13
"""First opset in which Cast supports bfloat16 (ONNX specification)."""

KEPT_FLOAT = ("LayerNormalization",)
"""Operators that stay float32 in addition to onnxruntime's own list: with float16 ones, onnxruntime 1.31.1 crashes on
the CPU when it optimises a vision transformer."""

_OPEN = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
"""Script that loads a model, to find out in a child process whether onnxruntime crashes."""

_STORED = 256
"""Minimum number of elements of weights stored as 16-bit floats; for smaller ones the Cast costs more than it saves
(heuristic)."""


def to_half(
    model: Model,
    kind: str = "float16",
    *,
    keep_io: bool = True,
    storage_only: bool = False,
    notify: Notify | None = None,
) -> Model:
    """Return the model converted from float32 to 16-bit floats.

    float16 is also the type of computation: onnxruntime's converter leaves operators without such a kernel in float32.
    bfloat16 has no CPU kernels in onnxruntime and is therefore always a storage format only, which float16 can be too:
    weights are stored in 16 bits, a Cast converts each to float32, and everything else is unchanged.

    Args:
        model: Model in float32.
        kind: One of `HALVES`.
        keep_io: Whether inputs and outputs stay float32; with `storage_only` they always do.
        storage_only: Whether weights are stored in 16 bits and computed with in float32.
        notify: Called with what stays float32, and why.

    Raises:
        UnsupportedError: There is nothing to convert, the model is over 2 GiB, or it cannot be converted.
    """
    if kind not in HALVES:
        raise TargetError(f"16-bit float type must be one of {', '.join(HALVES)}, got {kind!r}")
    notify = notify or ignore
    require_one_message(model, "converted to 16-bit floats")
    if kind == "bfloat16" or storage_only:
        if kind == "bfloat16" and not storage_only:
            notify(
                "onnxruntime has no bfloat16 kernels on the CPU: weights are stored as bfloat16, computed in float32"
            )
        return _stored(model, kind, notify)
    return _computed(model, keep_io, notify)


def _stored(model: Model, kind: str, notify: Notify) -> Model:
    """Return the model with weights in 16 bits, each followed by a Cast node whose output has the weight's name."""
    if kind == "bfloat16" and model.opset < OPSET:
        raise UnsupportedError(f"Cast supports bfloat16 from opset {OPSET} on: convert the model first")
    proto = embedded(model)
    names, wide, count = model.names(), list[str](), 0
    fed = {info.name for info in proto.graph.input}  # weights that a caller may feed are not changed
    for graph in graphs_of(proto.graph):
        casts = []
        for tensor in (t for t in graph.initializer if t.name not in fed):
            name = tensor.name
            if _narrow(tensor, kind, names, wide):
                casts.append(_cast(tensor.name, name))
        nodes = [*casts, *(new for node in graph.node for new in _constants(node, kind, names, wide))]
        count += len(nodes) - len(graph.node)
        del graph.node[:]
        graph.node.extend(nodes)
    if not count:
        raise UnsupportedError(f"no float32 weight has {_STORED} elements or more: there is nothing to store as {kind}")
    if wide:
        notify(f"{len(wide)} weights do not fit into {kind} and stay float32, like {wide[0]!r}")
    return valid(proto, model, f"storing weights as {kind}")


def _constants(node: NodeProto, kind: str, names: set[str], wide: list[str]) -> Iterator[NodeProto]:
    """Yield a node; a Constant with a large weight becomes one in 16 bits and a Cast."""
    tensor = next((a.t for a in node.attribute if a.name == "value"), None) if traits_of(node).is_constant else None
    if tensor is None:
        yield node
        return
    name, called = node.output[0], tensor.name
    tensor.name = name
    is_narrow = _narrow(tensor, kind, names, wide)
    stored, tensor.name = tensor.name, called
    if is_narrow:
        node.output[0] = stored
    yield node
    if is_narrow:
        yield _cast(stored, name)


def _cast(stored: str, name: str) -> NodeProto:
    return helper.make_node("Cast", [stored], [name], f"{stored}_cast", to=TensorProto.FLOAT)


def _narrow(tensor: TensorProto, kind: str, names: set[str], wide: list[str]) -> bool:
    """Convert a weight to 16 bits in place, under a new name; return whether it was large enough and in range."""
    if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _STORED:
        return False
    values = _narrowed(numpy_helper.to_array(tensor), kind)
    if values is None:
        wide.append(tensor.name)
        return False
    tensor.CopyFrom(numpy_helper.from_array(values, _fresh(f"{tensor.name}_{kind}", names)))
    return True


def _narrowed(values: Array, kind: str) -> Array | None:
    """Return the values in 16 bits, rounded to nearest; None if a finite one would overflow."""
    with np.errstate(over="ignore"):
        narrow = values.astype(element_type(TensorProto.FLOAT16 if kind == "float16" else TensorProto.BFLOAT16))
    lost = np.isfinite(values) & ~np.isfinite(narrow.astype(np.float32))
    return None if lost.any() else narrow


def _fresh(base: str, taken: set[str]) -> str:
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    taken.add(name)
    return name


def _computed(model: Model, keep_io: bool, notify: Notify) -> Model:
    """Return the model computed in float16, except operators without such kernels."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    if not any(tensor.data_type == TensorProto.FLOAT for tensor in tensors_of(model.proto)):
        raise UnsupportedError("the model has no float32 weights: there is nothing to convert to float16")
    if quantised_node(model) is not None:
        raise UnsupportedError("the model is quantised: its remaining floats cannot be converted to float16")
    with quiet(notify), translate_tool_errors("onnxruntime cannot convert the model to float16"):
        half = convert_float_to_float16(
            embedded(model), keep_io_types=keep_io, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_FLOAT]
        )
    _drop_repeats(half)
    converted = valid(tidied(half, model.proto), model, "the conversion to float16")
    _require_no_crash(converted)
    return converted


def _drop_repeats(proto: ModelProto) -> None:
    """Remove duplicates of Cast nodes, which the converter adds for each consumer of a tensor."""
    for graph in graphs_of(proto.graph):
        distinct: dict[bytes, NodeProto] = {node.SerializeToString(deterministic=True): node for node in graph.node}
        nodes = list(distinct.values())
        del graph.node[:]
        graph.node.extend(nodes)


def _require_no_crash(model: Model) -> None:
    """Raise UnsupportedError if onnxruntime crashes on the model, as it does on some float16 models on the CPU."""
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(embedded(model), path)  # at once, also where other files are written together
        line = [sys.executable, "-P", "-c", _OPEN, str(path)]
        done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 1):  # 1 is an exception, which the parent process will get too
        raise UnsupportedError(
            "onnxruntime crashes when it loads the float16 model on this CPU: use --storage-only, or keep float32"
        )
