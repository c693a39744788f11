"""The operators, one small function each, by family; importing this package fills `registry.OPERATORS`."""

from cpd_onnx.torch.operators import (
    attention,
    elementwise,
    generate,
    indexing,
    linear,
    loss,
    norm,
    pooling,
    quant,
    recurrent,
    reduce,
    resize,
    sequence,
    shape,
    signal,
    vision,
)

__all__ = [
    "attention",
    "elementwise",
    "generate",
    "indexing",
    "linear",
    "loss",
    "norm",
    "pooling",
    "quant",
    "recurrent",
    "reduce",
    "resize",
    "sequence",
    "shape",
    "signal",
    "vision",
]
