"""The imported model: a torch module that can say what its tensors are called in the ONNX file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import fx, nn

from cpd_onnx.errors import ModelError
from cpd_onnx.torch.dtypes import to_numpy, to_torch

Array = npt.NDArray[Any]

_NAMES = "onnx_names"


class OnnxModule(fx.GraphModule):
    """A generated module whose parameters and buffers are the tensors that the ONNX file stores.

    Trainable tensors are parameters, all others buffers, in ONNX layout and type. Attribute names are the ONNX names
    made into Python identifiers; `names` maps one to the other. Call it with tensors in the order of the graph's
    inputs; it returns a tuple in the order of the graph's outputs.
    """

    def __init__(self, root: Mapping[str, Any], graph: fx.Graph, names: Mapping[str, str]) -> None:
        """Build the module from what `import_model` collected.

        Args:
            root: attribute -> parameter, tensor or submodule that the graph refers to.
            graph: what the module computes.
            names: ONNX name -> attribute, for the tensors that the file stores.
        """
        super().__init__(dict(root), graph, "OnnxModule")
        if self.graph.eliminate_dead_code():
            self.recompile()
        self.meta[_NAMES] = dict(names)
        stored = set(names.values())
        for attribute, value in root.items():
            if isinstance(value, torch.Tensor):
                self._hold(attribute, value, persistent=attribute in stored)

    @property
    def names(self) -> dict[str, str]:
        """ONNX name -> name of the parameter or buffer, for all tensors that the file stores."""
        return dict(self.meta[_NAMES])

    def onnx_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by their ONNX names."""
        parameters = dict(self.named_parameters())
        return {name: parameters[attribute] for name, attribute in self.names.items() if attribute in parameters}

    def onnx_state(self) -> dict[str, Array]:
        """Copy of all tensors by their ONNX names, as numpy arrays of the file's types and shapes."""
        return {name: to_numpy(getattr(self, attribute)) for name, attribute in self.names.items()}

    def load_onnx_state(self, values: Mapping[str, Array]) -> None:
        """Overwrite tensors in place.

        Raises:
            ModelError: the module has no such tensor, or one of another shape.
        """
        for name, value in values.items():
            if name not in self.names:
                raise ModelError(f"the model has no tensor {name!r}; give values of the same model")
            target = getattr(self, self.names[name])
            if tuple(target.shape) != value.shape:
                raise ModelError(f"tensor {name!r} has shape {list(target.shape)}, its new value {list(value.shape)}")
            with torch.no_grad():
                target.copy_(to_torch(value))

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        """Copy the module with the tensors that its graph does not refer to, which fx leaves behind."""
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
