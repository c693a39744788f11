"""Sequences of tensors, as Python lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.registry import operator

Tensors = Sequence[Tensor]


@operator("SequenceConstruct")
def sequence_construct(*inputs: Tensor) -> Tensors:
    """Create a sequence of tensors."""
    return list(inputs)


@operator("SequenceEmpty")
def sequence_empty(*, dtype: int | None = None) -> Tensors:
    """Create an empty sequence."""
    return []


@operator("SequenceAt", host=(1,))
def sequence_at(sequence: Tensors, position: Numbers) -> Tensor:
    """Return one tensor of a sequence."""
    return sequence[int(position[0])]


@operator("SequenceInsert", host=(2,))
def sequence_insert(sequence: Tensors, x: Tensor, position: Numbers | None = None) -> Tensors:
    """Insert a tensor before a position, or at the end."""
    place = len(sequence) if position is None else int(position[0])
    return [*sequence[:place], x, *sequence[place:]]


@operator("SequenceErase", host=(1,))
def sequence_erase(sequence: Tensors, position: Numbers | None = None) -> Tensors:
    """Remove the tensor at a position, by default the last one."""
    place = (-1 if position is None else int(position[0])) % len(sequence)
    return [x for index, x in enumerate(sequence) if index != place]


@operator("SequenceLength")
def sequence_length(sequence: Tensors) -> Tensor:
    """Count the tensors."""
    return torch.tensor(len(sequence))


@operator("SplitToSequence", host=(1,))
def split_to_sequence(x: Tensor, sizes: Numbers | None = None, *, axis: int = 0, keepdims: int = 1) -> Tensors:
    """Split along an axis into single slices, parts of one size, or parts of the given sizes."""
    if sizes is None:
        return list(torch.split(x, 1, axis) if keepdims else torch.unbind(x, axis))
    return list(torch.split(x, int(sizes[0]) if len(sizes) == 1 else list(sizes), axis))


@operator("ConcatFromSequence")
def concat_from_sequence(sequence: Tensors, *, axis: int, new_axis: int = 0) -> Tensor:
    """Concatenate the tensors along an axis, or stack them along a new one."""
    return torch.stack(list(sequence), axis) if new_axis else torch.cat(list(sequence), axis)
