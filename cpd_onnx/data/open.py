"""Data in all supported forms: files, arrays, loaders, functions, or synthetic samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeAlias

from cpd_onnx.data.sources import ArraySource, FunctionSource, ImageOptions, Source, as_batch, inputs_of, open_source
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import DataError
from cpd_onnx.ir.model import Model
from cpd_onnx.shapes.inference import fold

SYNTHETIC = "synthetic"
"""Name of synthetic data."""
FORMS = f".npz, folder of images, module:function, or {SYNTHETIC!r}"
"""Forms of `--data`, for messages and help."""
Data: TypeAlias = "Source | str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any] | Callable[..., Iterable[Any]]"


def source_of(
    data: Data,
    model: Model,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    images: ImageOptions | None = None,
) -> Source:
    """Open data for a model, and check it against the model's inputs.

    Args:
        data: A source; a value of `--data` (an .npz file, a folder of images, `module:function` or "synthetic"); arrays
            by input name; or whole feeds, as `as_batch` reads them, in an object that can be iterated repeatedly, such
            as a list or a DataLoader of torch, or from a function that is called for each pass.
        model: Model whose inputs the data must fit.
        input_shapes: Sizes of dynamic input axes, by name of the input.
        images: Preprocessing of images of a folder.

    Raises:
        DataError: The data cannot be read or does not fit the model.
    """
    if isinstance(data, str) and data == SYNTHETIC:
        return Synthetic(fold(model, dict(input_shapes or {})))
    if isinstance(data, str | os.PathLike):
        return open_source(str(data) if isinstance(data, str) else Path(data), model.proto, images)
    return open_source(data if isinstance(data, Source) else _held(data, model), model.proto)


def _held(data: Any, model: Model) -> Source:
    """Return a source of data in memory."""
    inputs = inputs_of(model.proto)
    if isinstance(data, Mapping):
        return ArraySource(as_batch(data, inputs))
    if callable(data):
        return FunctionSource(data, inputs)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be a source, a path, arrays by input name, feeds or a function, got {type(data).__name__}"
        )
    if iter(data) is data:
        raise DataError("the data can be iterated only once: give a list, or a function that returns the feeds")
    return FunctionSource(lambda: data, inputs, len(data) if isinstance(data, Sized) else None)
