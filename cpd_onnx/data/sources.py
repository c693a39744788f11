"""Where calibration and training data come from.

A source gives batches: dictionaries from the names of the model's inputs to arrays, plus `labels` where there are any.
`open_source` makes one from what a user can write on a command line, and compares it with the model's inputs before
anything starts.

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
"""Name of the array that holds classes; no model input may be called so."""


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: its name in the graph.
        shape: a size, the name of a symbolic size, or None for each axis; None if not even the rank is known.
        dtype: numpy type of its elements.
    """

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        """Type and shape as in the ONNX text format: `float32[N,3,32,32]`."""
        axes = "..." if self.shape is None else ",".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype}[{axes}]"


@runtime_checkable
class Source(Protocol):
    """Something that gives batches."""

    @property
    def count(self) -> int | None:
        """Samples in one pass; None where that shows only at its end."""

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Give every sample once, `size` at a time (the last batch may be smaller); shuffled if there is a seed."""


def inputs_of(model: ModelProto) -> tuple[Input, ...]:
    """List the inputs that a caller has to feed, initializers excluded, in the order of the graph."""
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
    """Size of the first axis where the model prescribes it, None where it is free.

    Raises:
        DataError: the inputs prescribe different ones.
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
    """Samples at a time if the model says how many; a source that does not count its samples yields whole feeds."""
    return None if source.count is None else fixed_batch(inputs_of(model))


def calibration_batch(model: ModelProto, source: Source, samples: int, wish: int = 16) -> int:
    """Samples in a batch of `calibration`."""
    return _prescribed(model, source) or min(wish, samples)


def calibration(model: ModelProto, source: Source, samples: int, *, batch: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Feeds for a model, without labels, until so many samples were given; whole batches where it prescribes a size.

    Raises:
        DataError: the source does not fit the model, or has too few samples for one batch.
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
        raise DataError("the data has no whole batch of samples to look at")


# Sources.


def _order(count: int, size: int, seed: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of each batch of one pass."""
    if size < 1:
        raise ValueError(f"batch size must be positive, not {size}")
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return (order[start : start + size] for start in range(0, count, size))


class ArraySource:
    """Arrays in memory, one row a sample; an array without axes goes into every batch as it is."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Take arrays by input name.

        Raises:
            DataError: they hold different numbers of samples, or none.
        """
        self.arrays = dict(arrays)
        counts = {name: len(array) for name, array in self.arrays.items() if array.ndim}
        if len(set(counts.values())) != 1:
            listing = ", ".join(f"{name!r} {count}" for name, count in counts.items()) or "nothing"
            raise DataError(f"all arrays must have the same number of rows, but there are {listing}")
        self.count = next(iter(counts.values()))
        if self.count == 0:
            raise DataError("the arrays hold no samples")

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Slice all arrays alike."""
        for rows in _order(self.count, size, seed):
            yield {name: array[rows] if array.ndim else array for name, array in self.arrays.items()}


def height_width(text: str) -> tuple[int, int]:
    """Reads HEIGHT,WIDTH; raises ValueError."""
    sizes = commas(positive)(text)
    if len(sizes) != 2:
        raise ValueError(f"{text!r} is not HEIGHT,WIDTH")
    return sizes[0], sizes[1]


_of_images = partial(option, group="images of a folder")


@dataclass(frozen=True)
class ImageOptions:
    """How an image file becomes an input: resized, `(pixels * scale - mean) / std`, in the model's layout.

    Integer inputs get the pixels without the scale, models of one channel grey images.
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
"""Endings of image files."""
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")
"""What they may hold: Pillow goes by the content, and would start Ghostscript for one that holds PostScript."""
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
"""What decoders raise for broken images."""


class ImageFolder:
    """Image files below a folder; if they lie in sub-folders, the names of these, sorted, are the classes."""

    def __init__(self, folder: Path, entry: Input, options: ImageOptions | None = None) -> None:
        """List the files.

        Raises:
            DataError: there are none, or the model's input is no image.
        """
        self.entry, self.options = entry, options or ImageOptions()
        self.files = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not self.files:
            raise DataError(f"folder {str(folder)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.layout = image_layout(entry, self.options)
        self.count = len(self.files)
        folders = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in self.files]
        self.classes = sorted(set(folders)) if all(folders) else []
        self._labels = np.array([self.classes.index(name) for name in folders] if self.classes else [], np.int64)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Decode the files of one batch after the other."""
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
    """The part of an image (left, upper, right, lower) that becomes the input; None for all of it."""
    if resize is None:
        return None
    zoom = resize / min(size)
    if any(part > round(whole * zoom) for part, whole in zip(wanted, size, strict=True)):
        raise DataError(f"a shorter side of {resize} is too small to cut {wanted[0]} by {wanted[1]} out of {size}")
    starts = [(whole - part / zoom) / 2 for part, whole in zip(wanted, size, strict=True)]
    return (*(max(0.0, s) for s in starts), *(w - max(0.0, s) for s, w in zip(starts, size, strict=True)))


def image_layout(entry: Input, options: ImageOptions) -> tuple[int, int, int, bool]:
    """Height, width, channels, and whether channels come first, of an image input.

    Raises:
        DataError: the input is no image, or its size is free and no option gives it.
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
        raise DataError(f"input {entry.name!r} is {entry}; say with the image size what its free axes should be")
    assert isinstance(channels, int)
    return height, width, channels, first


def _image_module() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise DataError("reading images needs Pillow: pip install pillow, or give the data as .npz") from error


class FunctionSource:
    """A function that yields whole feeds, as `as_batch` reads them; it is called anew for every pass.

    It decides about batch size and order; it gets the seed if it has a parameter of that name.
    """

    count = None

    def __init__(
        self, function: Callable[..., Iterable[Any]], inputs: Sequence[Input], length: int | None = None
    ) -> None:
        """Take the function, the inputs that its feeds are compared with, and how many a pass has, if that is known."""
        self.function, self.inputs, self.length = function, tuple(inputs), length

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Pass on what the function yields, checked."""
        code = getattr(self.function, "__code__", None)
        takes_seed = code is not None and "seed" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for batch in self.function(seed=seed) if takes_seed else self.function():
            arrays = as_batch(batch, self.inputs)
            check_batch(arrays, self.inputs)
            yield arrays


def as_batch(given: Any, inputs: Sequence[Input]) -> Batch:
    """The batch that a function or a loader yields: arrays by input name, or the array of the only input.

    Either may come in a pair with the labels. Tensors of torch do as well as arrays.

    Raises:
        DataError: it is something else.
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
    """What random inputs look like.

    Attributes:
        count: samples in one pass.
        seed: of the generator; each sample depends on it and on its own number alone.
        sizes: symbolic axis -> size.
        free: size of an axis that has no name in `sizes`.
        high: integers are below this; 2 is safe for tokens, masks and types.
    """

    count: int = 64
    seed: int = 0
    sizes: tuple[tuple[str, int], ...] = ()
    free: int = 32
    high: int = 2


class RandomSource:
    """Normal numbers, small integers and fair coins in the shape of a model's inputs."""

    def __init__(self, inputs: Sequence[Input], options: RandomOptions | None = None) -> None:
        """Choose the free sizes.

        Raises:
            DataError: the rank of an input is unknown.
        """
        self.options = options or RandomOptions()
        self.count = self.options.count
        self._shapes = {entry.name: _sample_shape(entry, self.options) for entry in inputs}
        self._inputs = tuple(inputs)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Draw the samples of one batch after the other."""
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
        raise DataError(f"input {entry.name!r} has no shape; random data cannot be made for it, give the data as .npz")
    sizes = dict(options.sizes)
    return tuple(size if isinstance(size, int) else sizes.get(size or "", options.free) for size in entry.shape[1:])


def _draw(generator: np.random.Generator, entry: Input, shape: tuple[int, ...], options: RandomOptions) -> Array:
    if entry.dtype.kind in "iub":
        high = 2 if entry.dtype.kind == "b" else options.high
        return generator.integers(0, high, shape).astype(entry.dtype)
    return np.asarray(generator.standard_normal(shape)).astype(entry.dtype)


# Opening and checking.


def open_source(data: str | Path | Source, model: ModelProto, images: ImageOptions | None = None) -> Source:
    """Open what a user gave as `--data`, and check it against the model's inputs.

    Args:
        data: an .npz file, a folder of images, `module:function`, or a source that is passed on.
        model: whose inputs the data is for.
        images: how to prepare images of a folder.

    Raises:
        DataError: it cannot be read or does not fit the model.
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
    except OSError as error:  # a name that no file can have
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from error


def read_npz(path: Path) -> dict[str, Array]:
    """Arrays of an .npz file; those of an uncompressed one (numpy.savez) stay on disk until they are used.

    Raises:
        DataError: there is no such file, or it holds something else.
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
    """An array of an uncompressed archive, mapped from the file: only what a batch takes is read."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        start = stream.tell()
        if dtype.hasobject:
            raise ValueError(f"array {member.filename!r} holds Python objects")
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
    """The function that "module:function" names; DataError, which says what it should be, if there is none."""
    module, name = text.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{text!r} cannot be imported: {error}; is the module on PYTHONPATH?") from error
    except Exception as error:  # whatever the module raises when it runs, or Python for what is no name
        raise DataError(f"{text!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise DataError(f"{text!r} is a {type(function).__name__}, not a function {what}")
    result: Callable[..., Any] = function
    return result


def check_source(source: Source, inputs: Sequence[Input]) -> None:
    """Compare the first sample with the model's inputs.

    Raises:
        DataError: names, shapes or types differ, or there is no sample.
    """
    first = next(iter(source.batches(1)), None)
    if first is None:
        raise DataError("the data holds no samples")
    check_batch(first, inputs)


def check_batch(batch: Batch, inputs: Sequence[Input]) -> None:
    """Compare one batch with the model's inputs; the first axis may have any size.

    Raises:
        DataError: names, shapes or types differ.
    """
    wanted = {entry.name for entry in inputs}
    missing, surplus = sorted(wanted - set(batch)), sorted(set(batch) - wanted - {LABELS})
    if missing or surplus:
        given, needed = (", ".join(map(repr, sorted(names))) or "nothing" for names in (set(batch) - {LABELS}, wanted))
        raise DataError(f"the data holds {given} but the model's inputs are {needed}; name the arrays like the inputs")
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
    """Full batches in one pass, at least one; None where the source does not know its length."""
    if source.count is None:
        return source.length if isinstance(source, FunctionSource) else None
    return max(math.floor(source.count / size), 1)
