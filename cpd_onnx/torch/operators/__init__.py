"""The operators, one small function each, by family; importing this package registers them in `registry.OPERATORS`."""

from cpd_onnx.torch.operators import (
    contrib,
    elementwise,
    fused,
    generate,
    indexing,
    linear,
    loss,
    norm,
    quant,
    reduce,
    shape,
    signal,
)
from cpd_onnx.torch.operators.images import pooling, regions, resize
from cpd_onnx.torch.operators.sequences import attention, lists, recurrent

__all__ = [
    "attention",
    "contrib",
    "elementwise",
    "fused",
    "generate",
    "indexing",
    "linear",
    "lists",
    "loss",
    "norm",
    "pooling",
    "quant",
    "recurrent",
    "reduce",
    "regions",
    "resize",
    "shape",
    "signal",
]
