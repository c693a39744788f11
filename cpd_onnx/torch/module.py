"""The imported model: a torch module whose tensors are accessible by their names in the ONNX file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import fx, nn

from cpd_onnx.errors import ModelError
from cpd_onnx.torch.dtypes import to_numpy, to_torch
from cpd_onnx.torch.operators.quant import dequantize_linear, quantize_linear

Array = npt.NDArray[Any]

_NAMES = "onnx_names"
_QUANTISATIONS = "onnx_quantisations"


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of a parameter to the integers that the file stores.

    Attributes:
        scale: Name of the attribute of the module that holds the scale.
        zero_point: Name of the attribute that holds the zero point.
        options: `axis` and `block_size` of QuantizeLinear.
    """

    scale: str
    zero_point: str
    options: Mapping[str, int]


class OnnxModule(fx.GraphModule):
    """A generated module whose parameters and buffers are the tensors that the ONNX file stores.

    Trainable tensors are parameters, all others buffers, in ONNX layout and type; stored integers that a
    DequantizeLinear converts to floats are float parameters. Attribute names are the ONNX names turned into Python
    identifiers; `names` maps one to the other. Call it with tensors in the order of the graph's inputs; it returns a
    tuple in the order of the graph's outputs.
    """

    def __init__(
        self,
        root: Mapping[str, Any],
        graph: fx.Graph,
        names: Mapping[str, str],
        quantisations: Mapping[str, Quantisation] | None = None,
    ) -> None:
        """Create the module from the results of `import_model`.

        Args:
            root: Parameters, tensors and submodules that the graph refers to, by attribute name.
            graph: Computation of the module.
            names: Attribute names of the stored tensors by ONNX name.
            quantisations: Quantisations of parameters by ONNX name.
        """
        super().__init__(dict(root), graph, "OnnxModule")
        if self.graph.eliminate_dead_code():
            self.recompile()
        self.meta[_NAMES] = dict(names)
        self.meta[_QUANTISATIONS] = dict(quantisations or {})
        stored = set(names.values())
        for attribute, value in root.items():
            if isinstance(value, torch.Tensor):
                self._hold(attribute, value, persistent=attribute in stored)

    @property
    def names(self) -> dict[str, str]:
        """Names of the parameters and buffers by ONNX name, for all tensors that the file stores."""
        return dict(self.meta[_NAMES])

    def onnx_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by their ONNX names."""
        parameters = dict(self.named_parameters())
        return {name: parameters[attribute] for name, attribute in self.names.items() if attribute in parameters}

    def onnx_state(self) -> dict[str, Array]:
        """Return a copy of all tensors by their ONNX names, as numpy arrays of the file's types and shapes."""
        return {name: to_numpy(self._as_stored(name)) for name in self.names}

    def load_onnx_state(self, values: Mapping[str, Array]) -> None:
        """Overwrite tensors in place.

        Raises:
            ModelError: The module has no such tensor, or one of another shape.
        """
        for name, value in values.items():
            if name not in self.names:
                raise ModelError(f"the model has no tensor {name!r}; give values of the same model")
            target = getattr(self, self.names[name])
            if tuple(target.shape) != value.shape:
                raise ModelError(f"tensor {name!r} has shape {list(target.shape)}, its new value {list(value.shape)}")
            with torch.no_grad():
                target.copy_(self._from_stored(name, to_torch(value)))

    def _as_stored(self, name: str) -> torch.Tensor:
        """Return a tensor in the type of the file."""
        tensor: torch.Tensor = getattr(self, self.names[name])
        how = self.meta[_QUANTISATIONS].get(name)
        if how is None:
            return tensor
        operands = getattr(self, how.scale), getattr(self, how.zero_point)
        return quantize_linear(tensor.detach(), *operands, **how.options)

    def _from_stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the module's representation of a value of the file."""
        how = self.meta[_QUANTISATIONS].get(name)
        if how is None:
            return value
        operands = getattr(self, how.scale), getattr(self, how.zero_point)
        return dequantize_linear(value.to(operands[0].device), *operands, **how.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        """Return a copy of the module, including tensors that its graph does not refer to, which fx would drop."""
        result = super().__deepcopy__(memo)
        assert isinstance(result, OnnxModule)
        for attribute in [*self._parameters, *self._buffers]:
            value, persistent = getattr(self, attribute), attribute not in self._non_persistent_buffers_set
            if attribute not in self._parameters or not hasattr(result, attribute):
                result._hold(attribute, copy.deepcopy(value, memo), persistent=persistent)
        return result

    def _hold(self, attribute: str, value: torch.Tensor, *, persistent: bool) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(attribute, value)
        else:
            self.register_buffer(attribute, value, persistent=persistent)
