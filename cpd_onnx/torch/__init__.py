"""An ONNX file as a torch module whose parameters are the file's own initializers.

>>> from cpd_onnx.torch import import_model
>>> module = import_model(onnx.load("model.onnx"))            # doctest: +SKIP
>>> (logits,) = module(torch.randn(8, 3, 32, 32))             # doctest: +SKIP
>>> values = module.onnx_state()                              # doctest: +SKIP
"""

from cpd_onnx.torch.analysis import unsupported
from cpd_onnx.torch.importer import BatchNormMode, import_model
from cpd_onnx.torch.module import OnnxModule
from cpd_onnx.torch.registry import OPERATORS, Operator, operator
from cpd_onnx.torch.weights import read_weights, write_weights

__all__ = [
    "OPERATORS",
    "BatchNormMode",
    "OnnxModule",
    "Operator",
    "import_model",
    "operator",
    "read_weights",
    "unsupported",
    "write_weights",
]
