"""Conversion between the element types of ONNX, numpy and torch, exact to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, helper

from cpd_onnx.errors import UnsupportedError

Array = npt.NDArray[Any]

TORCH_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
"""Torch type by ONNX element type; torch has no tensors of the missing ones (strings, 4-bit types)."""

_BITS = {1: torch.uint8, 2: torch.int16}
"""Integer types that carry the bits of types numpy lacks (bfloat16, float8), by size in bytes."""


def numpy_dtype(elem_type: int) -> np.dtype[Any]:
    """Return the numpy type of an ONNX element type."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


_NUMPY_TO_TORCH = {numpy_dtype(onnx_type): torch_type for onnx_type, torch_type in TORCH_TYPES.items()}
_TORCH_TO_NUMPY = {torch_type: numpy_type for numpy_type, torch_type in _NUMPY_TO_TORCH.items()}


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return the torch type of a numpy type.

    Raises:
        UnsupportedError: torch has no such type.
    """
    if dtype not in _NUMPY_TO_TORCH:
        raise UnsupportedError(f"torch has no tensors of type {dtype}; convert the model to a common type first")
    return _NUMPY_TO_TORCH[dtype]


def elem_dtype(elem_type: int) -> torch.dtype:
    """Return the torch type of an ONNX element type.

    Raises:
        UnsupportedError: torch has no such type.
    """
    if elem_type not in TORCH_TYPES:
        name = TensorProto.DataType.Name(elem_type)
        raise UnsupportedError(f"torch has no tensors of type {name}; convert the model to a common type first")
    return TORCH_TYPES[elem_type]


def to_torch(array: Array) -> torch.Tensor:
    """Return a tensor with the shape, type and bits of an array."""
    dtype = torch_dtype(array.dtype)
    plain = np.array(array, order="C", copy=True)
    if array.dtype.kind != "V" and not _is_extended(array.dtype):
        return torch.from_numpy(plain)
    bits = _BITS[array.dtype.itemsize]
    return torch.from_numpy(plain.reshape(-1).view(_TORCH_TO_NUMPY[bits])).view(dtype).reshape(array.shape)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return an array with the shape, type and bits of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = _TORCH_TO_NUMPY[tensor.dtype]
    if not _is_extended(dtype):
        return np.array(tensor.numpy(), copy=True)
    bits = tensor.reshape(-1).view(_BITS[dtype.itemsize]).numpy()
    return np.array(bits.view(dtype).reshape(tuple(tensor.shape)), copy=True)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether weights of this type can be trained: float16, bfloat16, float32 or float64."""
    return dtype in _NUMPY_TO_TORCH and _NUMPY_TO_TORCH[dtype] in _TRAINABLE


_TRAINABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _is_extended(dtype: np.dtype[Any]) -> bool:
    """Return whether numpy knows the type only through ml_dtypes."""
    return dtype.type.__module__ != "numpy"
