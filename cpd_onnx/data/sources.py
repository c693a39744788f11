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
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, ValueInfoProto, helper

from cpd_onnx.errors import DataError
from cpd_onnx.options import above_zero, commas, number, option, positive

Array: TypeAlias = npt.NDArray[Any]
Batch: TypeAlias = dict[str, Array]

LABELS = "labels"
"""Name of the array of class labels, which no model input may have."""


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: Name in the graph.
        shape: Size, name of a symbolic size, or None for each axis; None if the rank is unknown.
        dtype: NumPy type of the elements.
    """

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        """Return type and shape as in the ONNX text format: `float32[N,3,32,32]`."""
        axes = "..." if self.shape is None else ",".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype}[{axes}]"


@runtime_checkable
class Source(Protocol):
    """An iterable source of batches."""

    @property
    def count(self) -> int | None:
        """Number of samples in one pass; None if it is not known in advance."""

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield every sample once, `size` at a time (the last batch may be smaller), shuffled if there is a seed."""


def inputs_of(model: ModelProto) -> tuple[Input, ...]:
    """Return the inputs that a caller has to feed, initializers excluded, in the order of the graph."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return tuple(_input(info) for info in model.graph.input if info.name not in stored)


def _input(info: ValueInfoProto) -> Input:
    if not info.type.HasField("tensor_type"):
        raise DataError(f"input {info.name!r} is not a tensor; only models with tensor inputs can be fed")
    tensor = info.type.tensor_type
    shape = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return Input(info.name, shape, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def _size(dim: Any) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return dim.dim_param or None


def fixed_batch(inputs: Sequence[Input]) -> int | None:
    """Return the batch size of a model, None if it is dynamic.

    Raises:
        DataError: The inputs have different fixed sizes.
    """
    sizes = {entry.shape[0] for entry in inputs if entry.shape}
    fixed = sorted(size for size in sizes if isinstance(size, int))
    if len(fixed) > 1:
        raise DataError(
            f"the model's inputs have first axes of different sizes {fixed}; "
            "give the data as module:function, which yields whole feeds"
        )
    return fixed[0] if fixed else None


def _prescribed(model: ModelProto, source: Source) -> int | None:
    """Return the fixed batch size of a model, None if it is dynamic or the source yields whole feeds."""
    return None if source.count is None else fixed_batch(inputs_of(model))


def calibration_batch(model: ModelProto, source: Source, samples: int, batch: int = 16) -> int:
    """Return the number of samples in a batch of `calibration`: the model's batch size, else at most `batch`."""
    return _prescribed(model, source) or min(batch, samples)


def calibration(model: ModelProto, source: Source, samples: int, *, batch: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Yield feeds for a model, without labels, with at least that many samples; only whole batches of a fixed size.

    Raises:
        DataError: The source does not fit the model, or has too few samples for one batch.
    """
    inputs = inputs_of(model)
    check_source(source, inputs)
    prescribed, seen = _prescribed(model, source), 0
    for rows in source.batches(calibration_batch(model, source, samples, batch), seed=seed):
        feed = {entry.name: rows[entry.name] for entry in inputs}
        count = next((len(array) for array in feed.values() if array.ndim), 1)
        if prescribed in (None, count):
            yield feed
            seen += count
        if seen >= samples:
            return
    if not seen:
        raise DataError("the data has too few samples for one batch of the model")


# Sources.


def _order(count: int, size: int, seed: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Return the indices of each batch of one pass."""
    if size < 1:
        raise ValueError(f"batch size must be at least 1, got {size}")
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return (order[start : start + size] for start in range(0, count, size))


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
        for rows in _order(self.count, size, seed):
            yield {name: array[rows] if array.ndim else array for name, array in self.arrays.items()}


def height_width(text: str) -> tuple[int, int]:
    """Return the sizes of HEIGHT,WIDTH; raises ValueError for another text."""
    sizes = commas(positive)(text)
    if len(sizes) != 2:
        raise ValueError(f"{text!r} is not HEIGHT,WIDTH")
    return sizes[0], sizes[1]


_of_images = partial(option, group="images of a folder")


@dataclass(frozen=True)
class ImageOptions:
    """Preprocessing of image files: resizing, then `(pixels * scale - mean) / std`, in the layout of the model.

    Integer inputs get unscaled pixels, and models with one channel grey images.
    """

    mean: tuple[float, ...] = _of_images(
        (0.0,), "Mean of each channel, or of all", read=commas(number), metavar="M,M,M"
    )
    std: tuple[float, ...] = _of_images(
        (1.0,), "Standard deviation of each channel, or of all", read=commas(number), metavar="S,S,S"
    )
    scale: float = _of_images(1 / 255, "Factor on pixels of 0..255 (default: 1/255)", read=above_zero)
    order: Literal["RGB", "BGR"] = _of_images("RGB", "Order of the channels", choices=("RGB", "BGR"))
    size: tuple[int, int] | None = _of_images(
        None, "Height and width, where the model leaves them open", read=height_width, metavar="H,W"
    )
    resize: int | None = _of_images(
        None,
        "Length that the shorter side is resized to, before the middle is cut out (default: squeeze to the size)",
        read=positive,
        metavar="N",
    )


IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})
"""Suffixes of image files."""
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")
"""Allowed formats: Pillow detects the format from the content, and would start Ghostscript for PostScript."""
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
"""Exceptions that decoders raise for damaged files."""


class ImageFolder:
    """Image files below a folder; if all are in subfolders, the sorted names of these are the classes."""

    def __init__(self, folder: Path, entry: Input, options: ImageOptions | None = None) -> None:
        """Find the files.

        Raises:
            DataError: There are none, or the model's input is not an image.
        """
        self.entry, self.options = entry, options or ImageOptions()
        self.files = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not self.files:
            raise DataError(f"folder {str(folder)!r} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.layout = image_layout(entry, self.options)
        self.count = len(self.files)
        folders = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self.files]
        self.classes = sorted(set(folders)) if all(folders) else []
        self._labels = np.array([self.classes.index(name) for name in folders] if self.classes else [], np.int64)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of decoded files."""
        for rows in _order(self.count, size, seed):
            batch = {self.entry.name: np.stack([self._read(self.files[row]) for row in rows])}
            if self.classes:
                batch[LABELS] = self._labels[rows]
            yield batch

    def _read(self, path: Path) -> Array:
        image = _image_module()
        height, width, channels, first = self.layout
        try:
            with warnings.catch_warnings(action="ignore"), image.open(path, formats=_FORMATS) as file:
                whole = file.convert("L" if channels == 1 else "RGB")
                box = _middle(whole.size, (width, height), self.options.resize)
                part = whole.resize((width, height), image.Resampling.BILINEAR, box)
        except (*_BROKEN, image.DecompressionBombError) as error:
            raise DataError(f"image {str(path)!r} cannot be read: {error}; repair or remove it") from error
        pixels = np.asarray(part).reshape(height, width, channels)
        if self.options.order == "BGR":
            pixels = pixels[..., ::-1]
        values = pixels.astype(self.entry.dtype)
        if self.entry.dtype.kind not in "iu":
            mean, std = (np.asarray(vector, np.float64) for vector in (self.options.mean, self.options.std))
            values = ((pixels * self.options.scale - mean) / std).astype(self.entry.dtype)
        return np.ascontiguousarray(values.transpose(2, 0, 1) if first else values)


def _middle(size: tuple[int, int], wanted: tuple[int, int], resize: int | None) -> tuple[float, ...] | None:
    """Return the part of an image (left, upper, right, lower) that is used; None for all of it."""
    if resize is None:
        return None
    zoom = resize / min(size)
    if any(part > round(whole * zoom) for part, whole in zip(wanted, size, strict=True)):
        raise DataError(f"a shorter side of {resize} is too small to cut {wanted[0]} by {wanted[1]} out of {size}")
    starts = [(whole - part / zoom) / 2 for part, whole in zip(wanted, size, strict=True)]
    return (*(max(0.0, s) for s in starts), *(w - max(0.0, s) for s, w in zip(starts, size, strict=True)))


def image_layout(entry: Input, options: ImageOptions) -> tuple[int, int, int, bool]:
    """Return height, width and channels of an image input, and whether channels come first.

    Raises:
        DataError: The input is not an image, or its size is dynamic and no option sets it.
    """
    shape = entry.shape or ()
    if len(shape) == 4 and shape[1] in (1, 3):
        channels, sizes, first = shape[1], shape[2:], True
    elif len(shape) == 4 and shape[3] in (1, 3):
        channels, sizes, first = shape[3], shape[1:3], False
    else:
        raise DataError(f"input {entry.name!r} is {entry}, not images of 1 or 3 channels; give the data as .npz")
    height, width = options.size or sizes
    if not isinstance(height, int) or not isinstance(width, int):
        raise DataError(f"input {entry.name!r} is {entry}: set its dynamic axes with --image-size")
    assert isinstance(channels, int)
    return height, width, channels, first


def _image_module() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise DataError("reading images needs Pillow: pip install pillow, or give the data as .npz") from error


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
        for rows in _order(self.count, size, seed):
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
    if entry.dtype.kind in "iub":
        high = 2 if entry.dtype.kind == "b" else options.high
        return generator.integers(0, high, shape).astype(entry.dtype)
    return np.asarray(generator.standard_normal(shape)).astype(entry.dtype)


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
        source = _open_folder(Path(data), inputs, images)
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


def _open_folder(folder: Path, inputs: Sequence[Input], images: ImageOptions | None) -> ImageFolder:
    if len(inputs) != 1:
        names = ", ".join(repr(entry.name) for entry in inputs)
        raise DataError(f"a folder of images feeds one input, but the model has {names}; give the data as .npz")
    return ImageFolder(folder, inputs[0], images)


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
    if array.dtype != entry.dtype:
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
