"""The batch size that the operators of a model require, although its signature leaves it open.

Exporters leave the first axis of an input open by its name even where a Reshape or a constant holds a number of
samples. onnxruntime runs such a model with that number of samples only.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from onnx import ModelProto

from cpd_onnx.ir.model import Model, load
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.open_inputs import real_inputs

_known: WeakKeyDictionary[Model, Mapping[str, int]] = WeakKeyDictionary()


def required_batches(model: Model) -> Mapping[str, int]:
    """Return the sizes of first axes that the operators of a model require, by the names of inputs that leave it open.

    Raises ModelError if the graph is invalid.
    """
    if model not in _known:
        _known[model] = _required(model) if _open_inputs(model) else {}
    return _known[model]


def stated(model: Model, like: Model | None = None) -> Model:
    """Return a model whose inputs state the batch size that its operators require; itself where they do already.

    Args:
        model: The model, which is not changed; the result is to be run, not to be written.
        like: Another form of the model, such as the original of a pruned one, whose requirements are taken.

    Raises:
        ModelError: The graph is invalid.
    """
    sizes = required_batches(like or model)
    if not sizes.keys() & set(_open_inputs(model)):
        return model
    copied = model.copy()
    _state(copied.proto, sizes)
    return copied


def stated_proto(proto: ModelProto) -> ModelProto:
    """Return what `stated` returns, of a model with its weights."""
    if not any(dim.dim_value <= 0 for info in proto.graph.input for dim in info.type.tensor_type.shape.dim[:1]):
        return proto
    sizes = required_batches(load(proto))
    if not sizes:
        return proto
    copied = ModelProto()
    copied.CopyFrom(proto)
    _state(copied, sizes)
    return copied


def _open_inputs(model: Model) -> list[str]:
    """Return the names of the inputs whose first axis has no size in the file."""
    return [
        info.name
        for info in real_inputs(model)
        if any(dim.dim_value <= 0 for dim in info.type.tensor_type.shape.dim[:1])
    ]


def _required(model: Model) -> dict[str, int]:
    values = fold(model, evaluates=False).scope.values
    found = {name: values[name] for name in _open_inputs(model)}
    return {name: value.shape[0] for name, value in found.items() if value.shape and value.has_fixed(0)}


def _state(proto: ModelProto, sizes: Mapping[str, int]) -> None:
    for info in proto.graph.input:
        if info.name in sizes:
            info.type.tensor_type.shape.dim[0].dim_value = sizes[info.name]
