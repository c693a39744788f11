"""Sources of calibration and training data.

A source yields batches: dictionaries of arrays by the names of the model's inputs, plus `labels` if there are any.
`open_source` opens the source that a command line names, and checks it against the model's inputs.

>>> source = ArraySource({"x": np.arange(5, dtype=np.float32)[:, None], LABELS: np.arange(5)})
>>> [batch["x"].ravel().tolist() for batch in source.batches(2)]
[[0.0, 1.0], [2.0, 3.0], [4.0]]
"""

from __future__ import annotations

import importlib
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from cpd_onnx.data.images.decoding import IMAGE_SUFFIXES
from cpd_onnx.data.images.folder import ImageFolder
from cpd_onnx.data.images.options import ImageOptions
from cpd_onnx.data.signature import LABELS, Array, Batch, Input, Source, fixed_batch, inputs_of, order_of, run_inputs
from cpd_onnx.errors import DataError
from cpd_onnx.ir.model import Model
from cpd_onnx.runtime.sessions import sample_count

__all__ = [
    "IMAGE_SUFFIXES", "LABELS", "Array", "ArraySource", "Batch", "FunctionSource", "ImageFolder", "ImageOptions",
    "Input", "RandomOptions", "RandomSource", "Source", "as_batch", "calibration", "calibration_batch", "check_batch",
    "check_source", "fixed_batch", "imported", "inputs_of", "open_source", "read_npz", "run_inputs", "steps_per_pass",
]  # fmt: skip  # the names of this module, and those of the modules below that belong to it

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
"""Exceptions that decoders raise for damaged files."""


def _prescribed(model: Model, source: Source) -> int | None:
    """Return the fixed batch size of a model, None if it is dynamic or the source yields whole feeds."""
    return None if source.count is None else fixed_batch(run_inputs(model))


def calibration_batch(model: Model, source: Source, samples: int, batch: int = 16) -> int:
    """Return the number of samples in a batch of `calibration`: the model's batch size, else at most `batch`."""
    return _prescribed(model, source) or min(batch, samples, source.count or batch)


def calibration(model: Model, source: Source, samples: int, *, batch: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Yield feeds for a model, without labels, with at least that many samples; only whole batches of a fixed size.

    Raises:
        DataError: The source does not fit the model, or has too few samples for one batch.
    """
    inputs = inputs_of(model.proto)
    check_source(source, inputs)
    prescribed, seen = _prescribed(model, source), 0
    for rows in source.batches(calibration_batch(model, source, samples, batch), seed=seed):
        feed = {entry.name: entry.taken(rows[entry.name]) for entry in inputs}
        count = sample_count(feed)
        if prescribed in (None, count):
            yield feed
            seen += count
        if seen >= samples:
            return
    if not seen:
        raise DataError("the data has too few samples for one batch of the model")


def numbers_in_sample(model: Model, source: Source) -> float:
    """Return how many numbers the inputs of a model have for each sample; raises DataError as `calibration`."""
    first = next(calibration(model, source, 1))
    return sum(array.size for array in first.values()) / sample_count(first)


def few_samples(most: int, sample_size: float, elements: int, fewest: int = 16) -> int:
    """Return how many samples suffice to fit weights to: each large one has many rows.

    Args:
        most: Maximum number of samples.
        sample_size: Numbers in the inputs of one sample.
        elements: Numbers in all samples that suffice.
        fewest: Number of samples, if there are as many, however large they are.
    """
    return int(min(most, max(fewest, elements / sample_size)))


# Sources.


class ArraySource:
    """Arrays in memory with one row a sample; scalar arrays are part of every batch."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Create a source from arrays by input name.

        Raises:
            DataError: They have different numbers of samples, or none.
        """
        self.arrays = dict(arrays)
        counts = {name: len(array) for name, array in self.arrays.items() if array.ndim}
        if len(set(counts.values())) != 1:
            listing = ", ".join(f"{name!r} {count}" for name, count in counts.items()) or "nothing"
            raise DataError(f"all arrays must have the same number of rows, got {listing}")
        self.count = next(iter(counts.values()))
        if self.count == 0:
            raise DataError("the arrays contain no samples")

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield the same rows of all arrays."""
        for rows in order_of(self.count, size, seed):
            yield self.read(rows)

    def read(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return these rows of all arrays."""
        return {name: array[rows] if array.ndim else array for name, array in self.arrays.items()}


class FunctionSource:
    """A function that yields whole feeds, as `as_batch` reads them; it is called for every pass.

    The function determines batch size and order; it receives the seed if it has a parameter of that name.
    """

    count = None

    def __init__(
        self, function: Callable[..., Iterable[Any]], inputs: Sequence[Input], length: int | None = None
    ) -> None:
        """Create a source from a function, the inputs that its feeds must fit, and their number, if that is known."""
        self.function, self.inputs, self.length = function, tuple(inputs), length

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield the checked feeds of the function."""
        code = getattr(self.function, "__code__", None)
        takes_seed = code is not None and "seed" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for batch in self.function(seed=seed) if takes_seed else self.function():
            arrays = as_batch(batch, self.inputs)
            check_batch(arrays, self.inputs)
            yield arrays


def as_batch(given: Any, inputs: Sequence[Input]) -> Batch:
    """Return the batch in a value that a function or loader yields: arrays by name, or the array of the only input.

    Either may be in a pair with the labels. Tensors of torch are converted to arrays.

    Raises:
        DataError: The value is something else.
    """
    feed, *labels = given if isinstance(given, (tuple, list)) and given else (given,)
    if len(labels) > 1 or (len(inputs) != 1 and not isinstance(feed, Mapping)):
        names = ", ".join(repr(entry.name) for entry in inputs)
        raise DataError(f"the data yields a {type(given).__name__}: yield dictionaries with arrays for {names}")
    named = dict(feed) if isinstance(feed, Mapping) else {inputs[0].name: feed}
    if labels:
        named[LABELS] = labels[0]
    return {name: _to_array(value) for name, value in named.items()}


def _to_array(value: Any) -> Array:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


@dataclass(frozen=True)
class RandomOptions:
    """Options of random inputs.

    Attributes:
        count: Number of samples in one pass.
        seed: Seed; each sample depends on it and on its index only.
        sizes: Sizes of symbolic axes by name.
        free: Size of dynamic axes that are not in `sizes`.
        high: Exclusive upper bound of integers; 2 is valid for tokens, masks and types.
    """

    count: int = 64
    seed: int = 0
    sizes: tuple[tuple[str, int], ...] = ()
    free: int = 32
    high: int = 2


class RandomSource:
    """Random inputs of a model: normal floats, small integers and Booleans."""

    def __init__(self, inputs: Sequence[Input], options: RandomOptions | None = None) -> None:
        """Set the dynamic sizes.

        Raises:
            DataError: The rank of an input is unknown.
        """
        self.options = options or RandomOptions()
        self.count = self.options.count
        self._shapes = {entry.name: _sample_shape(entry, self.options) for entry in inputs}
        self._inputs = tuple(inputs)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of random samples."""
        for rows in order_of(self.count, size, seed):
            samples = [self._sample(int(row)) for row in rows]
            yield {
                entry.name: np.stack([sample[entry.name] for sample in samples])
                if entry.shape
                else samples[0][entry.name]
                for entry in self._inputs
            }

    def _sample(self, row: int) -> Batch:
        generator = np.random.default_rng([self.options.seed, row])
        return {entry.name: _draw(generator, entry, self._shapes[entry.name], self.options) for entry in self._inputs}


def _sample_shape(entry: Input, options: RandomOptions) -> tuple[int, ...]:
    if entry.shape is None:
        raise DataError(f"input {entry.name!r} has no known shape for random data: give the data as .npz")
    sizes = dict(options.sizes)
    return tuple(size if isinstance(size, int) else sizes.get(size or "", options.free) for size in entry.shape[1:])


def _draw(generator: np.random.Generator, entry: Input, shape: tuple[int, ...], options: RandomOptions) -> Array:
    if entry.sampled_as.kind in "iub":
        high = 2 if entry.dtype.kind == "b" else options.high
        return generator.integers(0, high, shape).astype(entry.dtype)
    return np.asarray(generator.standard_normal(shape)).astype(entry.sampled_as)


# Opening and checking.


def open_source(data: str | Path | Source, model: ModelProto, images: ImageOptions | None = None) -> Source:
    """Open the data of an option `--data`, and check it against the model's inputs.

    Args:
        data: An .npz file, a folder of images, `module:function`, or a source, which is returned.
        model: Model whose inputs the data must fit.
        images: Preprocessing of images of a folder.

    Raises:
        DataError: The data cannot be read or does not fit the model.
    """
    inputs = inputs_of(model)
    if not isinstance(data, (str, Path)):
        source: Source = data
    elif _is_folder(Path(data)):
        source = _open_folder(Path(data), model, images)
    elif Path(data).suffix == ".npz":
        source = ArraySource(read_npz(Path(data)))
    elif re.fullmatch(r"[\w.]+:\w+", str(data)):
        source = FunctionSource(imported(str(data), "that yields dictionaries"), inputs)
    else:
        raise DataError(f"{str(data)!r} is not data: give an .npz file, a folder of images or module:function")
    check_source(source, inputs)
    return source


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that is not valid for a file
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error


def read_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an .npz file, memory-mapped if it is not compressed (numpy.savez).

    Raises:
        DataError: There is no such file, or it is not an .npz file.
    """
    if not path.is_file():
        what = f"{str(path)!r} is not a file" if path.exists() else f"there is no file {str(path)!r}"
        raise DataError(f"{what}: give an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if all(member.compress_type == zipfile.ZIP_STORED for member in members) and members:
                return {member.filename.removesuffix(".npy"): _mapped(path, archive, member) for member in members}
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (*_BROKEN, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise DataError(f"{str(path)!r} cannot be read as .npz: {error}; write it with numpy.savez") from error


def _mapped(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """Return an array of an uncompressed archive, memory-mapped so that only the used rows are read."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        start = stream.tell()
        if dtype.hasobject:
            raise ValueError(f"array {member.filename!r} contains Python objects")
        if fortran or 0 in shape or not shape:
            stream.seek(0)
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    offset = member.header_offset + 30 + name + extra + start
    return np.memmap(path, dtype, "r", offset, shape)


def _open_folder(folder: Path, model: ModelProto, images: ImageOptions | None) -> ImageFolder:
    inputs = inputs_of(model)
    if len(inputs) != 1:
        names = ", ".join(repr(entry.name) for entry in inputs)
        raise DataError(f"a folder of images feeds one input, but the model has {names}; give the data as .npz")
    entry = replace(inputs[0], dtype=inputs[0].sampled_as)
    return ImageFolder(folder, entry, images, _size_of_output(model))


def _size_of_output(model: ModelProto) -> tuple[int, int] | None:
    """Return height and width of the first output if it is fixed, as that of a segmentation model [N, C, h, w]."""
    dims = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] if model.graph.output else []
    return (dims[2], dims[3]) if len(dims) == 4 and min(dims[2:]) > 1 else None


def imported(text: str, what: str) -> Callable[..., Any]:
    """Return the function of "module:function"; raises DataError, which says what it must be, if there is none."""
    module, name = text.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{text!r} cannot be imported: {error}; is the module on PYTHONPATH?") from error
    except Exception as error:  # any exception of the module's code, or of Python for an invalid name
        raise DataError(f"{text!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise DataError(f"{text!r} is a {type(function).__name__}, not a function {what}")
    result: Callable[..., Any] = function
    return result


def check_source(source: Source, inputs: Sequence[Input]) -> None:
    """Check the first sample against the model's inputs.

    Raises:
        DataError: Names, shapes or types differ, or there is no sample.
    """
    first = next(iter(source.batches(1)), None)
    if first is None:
        raise DataError("the data contains no samples")
    check_batch(first, inputs)


def check_batch(batch: Batch, inputs: Sequence[Input]) -> None:
    """Check one batch against the model's inputs; the first axis may have any size.

    Raises:
        DataError: Names, shapes or types differ.
    """
    wanted = {entry.name for entry in inputs}
    missing, surplus = sorted(wanted - set(batch)), sorted(set(batch) - wanted - {LABELS})
    if missing or surplus:
        given, needed = (", ".join(map(repr, sorted(names))) or "nothing" for names in (set(batch) - {LABELS}, wanted))
        raise DataError(
            f"the data contains {given} but the model's inputs are {needed}: name the arrays like the inputs"
        )
    for entry in inputs:
        _check_array(batch[entry.name], entry)


def _check_array(array: Array, entry: Input) -> None:
    if array.dtype not in (entry.dtype, entry.sampled_as):
        raise DataError(
            f"array {entry.name!r} is {array.dtype} but the model's input is {entry}; convert it to {entry.dtype}"
        )
    if entry.shape is None:
        return
    fits = array.ndim == len(entry.shape) and all(
        not isinstance(wanted, int) or size == wanted
        for size, wanted in zip(array.shape[1:], entry.shape[1:], strict=True)
    )
    if not fits:
        rows = ",".join(["batch", *map(str, array.shape[1:])]) if array.ndim else ""
        raise DataError(f"array {entry.name!r} is {array.dtype}[{rows}] but the model's input is {entry}; reshape it")


def steps_per_pass(source: Source, size: int) -> int | None:
    """Return the number of full batches in one pass, at least 1; None if the length of the source is unknown."""
    if source.count is None:
        return source.length if isinstance(source, FunctionSource) else None
    return max(math.floor(source.count / size), 1)
