"""Samples in the forms that people have them in: files, arrays, loaders, functions, or none at all."""

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
"""Stands for data where there is none."""
FORMS = f".npz, folder of images, module:function, or {SYNTHETIC!r}"
"""What `--data` takes."""
Data: TypeAlias = "Source | str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any] | Callable[..., Iterable[Any]]"


def source_of(
    data: Data,
    model: Model,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    images: ImageOptions | None = None,
) -> Source:
    """Open data for a model, and check it against the model's inputs.

    Args:
        data: a source; what `--data` takes, an .npz file, a folder of images, `module:function` or "synthetic"; arrays
            by input name; whole feeds, as `as_batch` reads them, in something that can be gone through again, a list
            or a DataLoader of torch, or from a function that is called for each pass.
        model: whose inputs the data is for.
        input_shapes: sizes of inputs that the file leaves open, by name.
        images: how to prepare images of a folder.

    Raises:
        DataError: it cannot be read or does not fit the model.
    """
    if isinstance(data, str) and data == SYNTHETIC:
        return Synthetic(fold(model, dict(input_shapes or {})))
    if isinstance(data, str | os.PathLike):
        return open_source(str(data) if isinstance(data, str) else Path(data), model.proto, images)
    return open_source(data if isinstance(data, Source) else _held(data, model), model.proto)


def _held(data: Any, model: Model) -> Source:
    """The source of what lies in memory."""
    inputs = inputs_of(model.proto)
    if isinstance(data, Mapping):
        return ArraySource(as_batch(data, inputs))
    if callable(data):
        return FunctionSource(data, inputs)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data is a source, a path, arrays by input name, feeds or a function, not {type(data).__name__}"
        )
    if iter(data) is data:
        raise DataError("the data can be gone through only once: give a list, or the function that makes its feeds")
    return FunctionSource(lambda: data, inputs, len(data) if isinstance(data, Sized) else None)
