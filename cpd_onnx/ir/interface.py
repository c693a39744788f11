"""Inputs and outputs that have lost channels, and the channels that they kept, in the metadata of the model.

A model whose inputs or outputs may change size (`Model.free_io`) is fed with arrays of the original's sizes as well:
the metadata say which of their indices it takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from onnx import ModelProto

from cpd_onnx.ir.model import Array, Model

Kept: TypeAlias = dict[str, dict[int, list[int]]]
"""Indices of the original's axes that inputs and outputs keep, by name and axis."""

PREFIX = "cpd-onnx.kept."
"""Beginning of the keys of the metadata, before the name of the input or output."""


def record(model: Model, kept: Kept) -> None:
    """Write into the metadata of a model which indices its inputs and outputs keep, in place of earlier entries."""
    properties = model.proto.metadata_props
    for old in [entry for entry in properties if entry.key.startswith(PREFIX)]:
        properties.remove(old)
    for name, axes in sorted(kept.items()):
        properties.add(key=f"{PREFIX}{name}", value=json.dumps({str(axis): axes[axis] for axis in sorted(axes)}))


def kept_by(model: Model | ModelProto) -> Kept:
    """Return which indices the inputs and outputs of a model keep; empty for one that has lost none."""
    proto = model.proto if isinstance(model, Model) else model
    return kept_in({entry.key: entry.value for entry in proto.metadata_props})


def kept_in(metadata: Mapping[str, str]) -> Kept:
    """Return what `kept_by` returns, from metadata; entries that cannot be read are left out."""
    found: Kept = {}
    for key, value in metadata.items():
        if not key.startswith(PREFIX):
            continue
        try:
            axes = {int(axis): [int(index) for index in indices] for axis, indices in json.loads(value).items()}
        except (AttributeError, TypeError, ValueError):
            continue
        if all(indices and min(indices) >= 0 for indices in axes.values()):
            found[key.removeprefix(PREFIX)] = axes
    return found


def cut(array: Array, axes: Mapping[int, list[int]]) -> Array:
    """Return the part of an array of the original's sizes that is kept; one of the present sizes is returned as it is.

    Args:
        array: Values of an input or output.
        axes: Indices that are kept, by axis.
    """
    for axis, indices in axes.items():
        size = array.shape[axis] if axis < array.ndim else 0
        if size != len(indices) and size > max(indices):
            array = np.take(array, indices, axis)
    return array


def all_cut(arrays: Mapping[str, Array], kept: Kept) -> dict[str, Array]:
    """Return arrays by name, those of inputs or outputs that have lost channels without these."""
    return {name: cut(array, kept[name]) if name in kept else array for name, array in arrays.items()}
