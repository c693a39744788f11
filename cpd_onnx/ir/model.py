"""An ONNX model as it lies in the file: the proto without its large tensors, and the tensors beside it.

The proto is the truth and is edited in place; what is not edited is written back as it was read. Weights are kept
apart from the proto, so that copies of it are cheap. They are looked at where they lie, mapped into memory; those of a
large model are read, or computed, when somebody asks, one at a time, and not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from cpd_onnx.errors import CpdError, ModelError, ProofError
from cpd_onnx.io.files import Stored, afterwards, is_same, locked, replacing, require_free, write_atomically
from cpd_onnx.io.protowire import detached, joined
from cpd_onnx.summary import Summary

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import onnx_ir

Array: TypeAlias = npt.NDArray[Any]
FunctionName: TypeAlias = tuple[str, str, str]
"""Domain, name and overload."""
Source: TypeAlias = "str | os.PathLike[str] | ModelProto | gs.Graph | onnx_ir.Model | Model"

_DETACH_BYTES = 1024
"""Tensors from this size on are held outside the proto."""
_LARGE_BYTES = 1 << 28
"""Weights of models from this size on are read one by one."""
_LAZY_BYTES = 1 << 16
"""Of these, tensors from this size on; smaller ones are read at once."""
_ALIGNMENT = 4096
"""Of tensors in data files."""
_PROTO_LIMIT = 2**31 - 2**20
"""Bytes that one protobuf message may hold, with some room to spare."""
_PACKED = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.INT2, TensorProto.UINT2}
_PLAIN: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<f4"), TensorProto.INT64: np.dtype("<i8"), TensorProto.INT32: np.dtype("<i4"),
}  # fmt: skip  # a table
"""The commonest element types, as they lie in `raw_data`."""
PLACES = ("as-is", "inside", "beside")
"""Where a model's weights may go."""
_DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor whose values are read or computed each time that they are asked for.

    Attributes:
        dtype: of the elements.
        shape: sizes of the axes.
        make: gives the values.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Bytes that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize


def made(values: Array | Lazy) -> Array:
    """The values, read or computed now if they were not yet."""
    return values.make() if isinstance(values, Lazy) else values


def later(values: Array | Lazy, shape: Iterable[int], function: Callable[[Array], Array]) -> Array | Lazy:
    """What a function makes of values, now or, if they are not read yet, once they are; `shape` is what it gives."""
    if isinstance(values, Lazy):
        return Lazy(values.dtype, tuple(shape), lambda: function(values.make()))
    return function(values)


class Model:
    """A model proto and its tensors.

    Attributes:
        proto: the model; initializers whose data is detached have dims and type but no data.
        path: the file that it came from, if any.
        data_files: the files beside it that its weights came from.

    """

    def __init__(
        self, proto: ModelProto, data: dict[str, Array | Lazy], path: Path | None = None, file: Stored | None = None
    ) -> None:
        """Take a proto whose main-graph initializers named in `data` hold no data of their own.

        `file` is what was read from `path`.
        """
        self.proto = proto
        self.path = path
        self.data_files: frozenset[Path] = frozenset()
        self._data = data
        self._file = file
        self._initializers = {t.name: t for t in proto.graph.initializer}

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.proto.graph

    @property
    def opset(self) -> int:
        """Version of the default operator set, 1 if the model imports none."""
        return next((o.version for o in self.proto.opset_import if o.domain in _DEFAULT_DOMAINS), 1)

    @property
    def is_external(self) -> bool:
        """Whether some initializer lies in a file of its own."""
        return any(t.data_location == TensorProto.EXTERNAL for t in self.graph.initializer)

    def summary(self) -> Summary:
        """What the file holds."""
        shapes = {
            kind: ", ".join(f"{i.name} {_dims(i)}" for i in entries if not self.has(i.name))
            for kind, entries in (("inputs", self.graph.input), ("outputs", self.graph.output))
        }
        return Summary.of({
            "model": str(self.path or self.graph.name), "opset": str(self.opset),
            "nodes": str(len(self.graph.node)), "initializers": str(len(self.graph.initializer)), **shapes,
        })  # fmt: skip  # a table

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.summary().html()

    def copy(self) -> Model:
        """Copy that can be edited without touching this one; tensors are shared until replaced."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        copied = Model(proto, dict(self._data), self.path)
        copied.data_files = self.data_files
        return copied

    def sha256(self) -> str:
        """SHA-256 of the file that it was read from, or of its serialized proto; data files follow in order."""
        return self._sha256 if self._file is not None else _digest(self._pieces())

    @cached_property
    def _sha256(self) -> str:
        assert self._file is not None
        apart = [t.name for t in self.graph.initializer if t.dims] if self.is_external else []
        return _digest(itertools.chain(self._file.chunks(), (_bytes_of(self.array(name)) for name in apart)))

    def has(self, name: str) -> bool:
        """Whether the main graph has an initializer of that name."""
        return name in self._initializers

    def tensor(self, name: str) -> TensorProto:
        """The initializer's proto, perhaps without data."""
        found: TensorProto = self._initializers[name]
        return found

    def is_detached(self, name: str) -> bool:
        """Whether the values of a main-graph initializer are held outside the proto."""
        return name in self._data

    def array(self, name: str) -> Array:
        """Values of a main-graph initializer; do not write into it."""
        return made(self.lazily(name))

    def lazily(self, name: str) -> Array | Lazy:
        """The same, but not read yet where the model is large."""
        return self._data[name] if name in self._data else to_array(self._initializers[name])

    def set_array(self, name: str, values: Array | Lazy) -> None:
        """Replace the values (and dims) of a main-graph initializer; the element type must stay."""
        tensor = self._initializers[name]
        if values.dtype != element_type(tensor.data_type):
            raise TypeError(f"initializer {name!r} is {element_type(tensor.data_type)}, not {values.dtype}")
        if name in self._data:
            del tensor.dims[:]
            tensor.dims.extend(values.shape)
            self._data[name] = values if isinstance(values, Lazy) else np.ascontiguousarray(values)
        else:
            replace_values(tensor, made(values))

    def retype(self, name: str, values: Array | Lazy) -> None:
        """Replace an initializer by one of another element type."""
        tensor = self._initializers[name]
        self._data.pop(name, None)
        tensor.CopyFrom(TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype)))
        tensor.dims.extend(values.shape)
        if isinstance(values, Lazy) or values.nbytes >= _DETACH_BYTES:
            self._data[name] = values
        else:
            replace_values(tensor, values)

    def add_initializer(self, name: str, values: Array | Lazy) -> None:
        """Append an initializer to the main graph."""
        tensor = self.graph.initializer.add()
        self._initializers[name] = tensor
        if isinstance(values, Lazy):
            tensor.name, tensor.data_type = name, helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor.dims.extend(values.shape)
            self._data[name] = values
        else:
            tensor.CopyFrom(numpy_helper.from_array(values, name))

    def drop_initializer(self, name: str) -> None:
        """Take an initializer out of the main graph."""
        position = next(n for n, tensor in enumerate(self.graph.initializer) if tensor.name == name)
        del self.graph.initializer[position]
        self._data.pop(name, None)
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}

    def names(self) -> set[str]:
        """All value names in use, of subgraphs too."""
        used: set[str] = set()
        for graph in graphs_of(self.graph):
            used.update(t.name for t in graph.initializer)
            used.update(v.name for v in graph.input)
            used.update(name for node in graph.node for name in (*node.input, *node.output))
        return used

    def complete_proto(self) -> ModelProto:
        """A copy of the proto with all data embedded; for models under 2 GiB."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            if tensor.name in self._data:
                _clear_external(tensor)
                tensor.raw_data = self.array(tensor.name).tobytes()
        return proto

    def data_bytes(self) -> int:
        """Bytes that the detached tensors take."""
        return sum(array.nbytes for array in self._data.values())

    def serialize(self) -> bytes:
        """The whole model as one protobuf message."""
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        """The message in pieces, none of which copies a large tensor."""
        if self.is_over_limit:
            raise ModelError("the model is over 2 GiB and cannot be one message: save it with external data instead")
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        lengths: dict[int, int] = {}
        for number, tensor in enumerate(proto.graph.initializer):
            if tensor.name in self._data:
                _clear_external(tensor)
                tensor.raw_data = b""
                lengths[number] = self._data[tensor.name].nbytes
        for piece in joined(proto.SerializeToString(), lengths):
            yield _bytes_of(self.array(proto.graph.initializer[piece].name)) if isinstance(piece, int) else piece

    @property
    def is_over_limit(self) -> bool:
        """Whether the model cannot be one protobuf message."""
        return bool(self.data_bytes() + self.proto.ByteSize() > _PROTO_LIMIT)

    def defect(self) -> str | None:
        """What onnx's checker has to say against the model, in one line; None if it is valid (or over 2 GiB)."""
        if self.is_over_limit:
            return None
        try:
            onnx.checker.check_model(self.complete_proto(), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError) as error:
            return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
        return None

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False, weights: str = PLACES[0]) -> None:
        """Write the model, whole or not at all.

        Args:
            path: where to.
            overwrite: whether a file that is there may go.
            weights: one of `PLACES`; "as-is" is beside the model where they came from a file of their own, or over
                2 GiB. The name of that file holds the start of the SHA-256 of what is in it, so that the data of an
                older model is there until the new model has taken its place.

        Raises:
            ModelError: a file is there, the folder cannot be written, or the model is too large for one file.
        """
        target = Path(path)
        require_free(target, overwrite=overwrite)
        lies_apart = weights == "beside" or (weights == "as-is" and (self.is_external or self.is_over_limit))
        with locked(target.parent):
            side = ""
            if lies_apart:
                proto, side = self._save_data(target)
                write_atomically(target, proto.SerializeToString())
            else:
                with replacing(target) as stream:
                    for piece in self._pieces():
                        stream.write(piece)
            afterwards(lambda: self._remove_older_data(target, side))

    def _remove_older_data(self, target: Path, side: str) -> None:
        """Remove the data files of older models of that name, and of runs that were killed.

        Those of the model that this one was made of may have such a name too: it may have been renamed since.
        """
        own = self.data_files if self.path is None or not is_same(self.path, target) else ()
        for file in target.parent.iterdir():
            is_older = re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{8}\.data", file.name) and file.name != side
            if is_older and file.resolve() not in own:
                file.unlink(missing_ok=True)

    def _save_data(self, target: Path) -> tuple[ModelProto, str]:
        """Write the data file of a model; the proto that points to it, and its name."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        apart = [tensor for tensor in proto.graph.initializer if tensor.name in self._data]
        digest, places = hashlib.sha256(), list[tuple[int, int]]()

        def side() -> Path:
            return target.with_name(f"{target.name}.{digest.hexdigest()[:8]}.data")

        with replacing(side) as stream:
            offset = 0
            for tensor in apart:
                raw, gap = _bytes_of(self.array(tensor.name)), -offset % _ALIGNMENT
                for piece in (bytes(gap), raw):
                    digest.update(piece)
                    stream.write(piece)
                places.append((offset + gap, len(raw)))
                offset += gap + len(raw)
        for tensor, place in zip(apart, places, strict=True):
            _point_to(tensor, side().name, *place)
        return proto, side().name


def _dims(entry: ValueInfoProto) -> str:
    """The shape of an input or output, as the file has it."""
    dims = entry.type.tensor_type.shape.dim
    return f"[{', '.join(dim.dim_param or str(dim.dim_value or '?') for dim in dims)}]"


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def load(source: Source) -> Model:
    """Read a model from a path, a ModelProto, an onnx-graphsurgeon graph or an onnx-ir model, or pass a Model through.

    Raises ModelError for a file that is missing, broken, or whose external data is missing or leaves its folder.
    """
    if isinstance(source, Model):
        return source
    path, file = None, None
    places: dict[int, tuple[int, int]] = {}
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        file = Stored(path)
        proto, places = _parse(path, file.content)
    elif isinstance(source, ModelProto):
        proto = ModelProto()
        proto.CopyFrom(source)
    else:
        proto = _exported(source)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path or 'the model'}: the graph is empty; is this an ONNX model?")
    if not proto.graph.output:
        raise ModelError(f"{path or 'the model'}: the graph has no outputs: export the model again")
    try:
        model = Model(proto, {}, path, file)
        _detach(model, file, places)
        model.names()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path or 'the model'} has names that are not text: export or copy it again") from error
    return model


def in_form_of(source: Source, model: Model) -> Any:
    """The model as an object of the kind that `load` took: a Model for a path; it must be below 2 GiB for others."""
    if isinstance(source, str | os.PathLike | Model):
        return model
    proto = model.complete_proto()
    if isinstance(source, ModelProto):
        return proto
    if _is_of_onnx_ir(source):
        return sys.modules["onnx_ir"].from_proto(proto)
    import onnx_graphsurgeon as gs

    return gs.import_onnx(proto)


def _is_of_onnx_ir(source: Any) -> bool:
    """Whether it is a model of onnx-ir, which somebody must have imported then."""
    library = sys.modules.get("onnx_ir")
    return library is not None and isinstance(source, library.Model)


def _exported(source: Any) -> ModelProto:
    """The proto of a model that another library holds."""
    if _is_of_onnx_ir(source):
        library = sys.modules["onnx_ir"]
        proto: ModelProto = library.to_proto(library.external_data.load_to_model(source.clone()))
        return proto
    import onnx_graphsurgeon as gs

    if not isinstance(source, gs.Graph):
        raise TypeError(
            "a model is a path, a ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model, "
            f"not {type(source).__name__}"
        )
    made: ModelProto = gs.export_onnx(source)
    return made


@contextlib.contextmanager
def blaming(model: Model) -> Iterator[None]:
    """Raise ModelError for what fails inside because the model is not valid ONNX; else it goes on as it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CpdError) and not isinstance(error, ProofError):
            raise
        reason = "it has names that are not text" if isinstance(error, UnicodeError) else model.defect()
        if reason is None:
            raise
        raise ModelError(f"the model is not valid ONNX: {reason}") from error


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs in attributes of its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for body in bodies_of(node).values():
            yield from graphs_of(body)


def bodies_of(node: NodeProto) -> dict[str, GraphProto]:
    """The subgraphs of a node by attribute name."""
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


def functions_of(proto: ModelProto) -> dict[FunctionName, FunctionProto]:
    """The functions of a model; those of one name differ in their overload."""
    return {(function.domain, function.name, function.overload): function for function in proto.functions}


def called_by(node: NodeProto) -> FunctionName:
    """The function that a node calls, if there is one of that name."""
    return (node.domain, node.op_type, node.overload)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The node's attributes as Python values; strings decoded, tensors as TensorProto."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            continue
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        found[attribute.name] = value
    return found


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set or replace one attribute in its place."""
    made = helper.make_attribute(name, value)
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.CopyFrom(made)
            return
    node.attribute.append(made)


def drop_attribute(node: NodeProto, name: str) -> None:
    """Remove an attribute if it is there."""
    for index, attribute in enumerate(node.attribute):
        if attribute.name == name:
            del node.attribute[index]
            return


def element_type(data_type: int) -> np.dtype[Any]:
    """The numpy type of an ONNX element type; ModelError if there is none of that number."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError as error:
        raise ModelError(
            f"element type {data_type} is not known: export the model for onnx {onnx.__version__}"
        ) from error


def element_bytes(data_type: int) -> float:
    """Bytes that an element of an ONNX type takes in a file; 0 for strings, whose length is their own."""
    if data_type in _PACKED:
        return 0.25 if data_type in (TensorProto.INT2, TensorProto.UINT2) else 0.5
    return 0.0 if data_type in (TensorProto.STRING, TensorProto.UNDEFINED) else float(element_type(data_type).itemsize)


def to_array(tensor: TensorProto) -> Array:
    """Values of a tensor whose data lies in the proto."""
    kind = _PLAIN.get(tensor.data_type)
    if kind is not None and (raw := tensor.raw_data) and len(raw) == math.prod(tensor.dims) * kind.itemsize:
        return np.frombuffer(raw, kind).reshape(tuple(tensor.dims))
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"tensor {tensor.name!r}: its data does not fit dims {list(tensor.dims)} ({error})") from error


def replace_values(tensor: TensorProto, values: Array) -> None:
    """Put new values into a tensor proto, everything else as it was."""
    made = numpy_helper.from_array(np.ascontiguousarray(values), tensor.name)
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data", "raw_data"):
        tensor.ClearField(field)
    del tensor.dims[:]
    tensor.dims.extend(values.shape)
    tensor.raw_data = made.raw_data


def _parse(path: Path, content: memoryview) -> tuple[ModelProto, dict[int, tuple[int, int]]]:
    """The message without its large tensors, and where in the content these lie."""
    small, places = detached(content, _DETACH_BYTES) or (content, {})
    proto = ModelProto()
    try:
        proto.ParseFromString(small)
    except DecodeError as error:
        raise ModelError(f"{path} is not a whole ONNX file ({error}): export or copy it again") from error
    return proto, places


def _detach(model: Model, file: Stored | None, places: dict[int, tuple[int, int]]) -> None:
    """Keep large tensors apart from the proto, and look at external ones where they lie."""
    reader = _Reader(model, file)
    for number, tensor in enumerate(model.graph.initializer):
        start, end = places.get(number, (0, len(tensor.raw_data)))
        _require_sizes(tensor, end - start)
        if tensor.data_location == TensorProto.EXTERNAL:
            model._data[tensor.name] = reader.external(tensor)
        elif tensor.data_type not in _PACKED and end - start >= _DETACH_BYTES:
            _require_bytes(tensor, end - start)
            if number in places:
                assert file is not None
                model._data[tensor.name] = reader.array(tensor, file, start)
            else:
                model._data[tensor.name] = to_array(tensor)
            tensor.ClearField("raw_data")
        elif number in places:
            assert file is not None
            tensor.raw_data = file.read(start, end - start).tobytes()
    for tensor in _inner_tensors(model.proto):
        _require_sizes(tensor)  # onnxruntime would not survive it
        if tensor.data_location == TensorProto.EXTERNAL:
            found = reader.external(tensor)
            _clear_external(tensor)
            tensor.raw_data = made(found).tobytes()
    model.data_files = frozenset(reader.files)


class _Reader:
    """Makes arrays of what lies in the files of a model."""

    def __init__(self, model: Model, file: Stored | None) -> None:
        self._folder = model.path.parent if model.path else None
        apart = (t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        whole = (file.size if file else 0) + sum(_wanted_bytes(tensor) for tensor in apart)
        self._is_large = whole > _LARGE_BYTES
        self.files: dict[Path, Stored] = {}

    def array(self, tensor: TensorProto, file: Stored, start: int) -> Array | Lazy:
        """A tensor from a position of a file on."""
        dtype, shape, length = element_type(tensor.data_type), tuple(tensor.dims), _wanted_bytes(tensor)
        if not self._is_large:
            return np.frombuffer(file.content, np.uint8, length, start).view(dtype).reshape(shape)

        def read() -> Array:
            return file.read(start, length).view(dtype).reshape(shape)

        return Lazy(dtype, shape, read) if length >= _LAZY_BYTES else read()

    def external(self, tensor: TensorProto) -> Array | Lazy:
        """A tensor in a data file, which must be a regular one inside the model's folder."""
        folder = self._folder
        if folder is None:
            raise ModelError(f"tensor {tensor.name!r} lies in an external file: load the model from its path")
        info = {e.key: e.value for e in tensor.external_data}
        location = info.get("location", "")
        if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise ModelError(f"tensor {tensor.name!r}: external location {location!r} leaves the model's folder")
        try:
            base, real = folder.resolve(), (folder / location).resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise ModelError(f"tensor {tensor.name!r}: external location {location!r} leads nowhere") from error
        if not real.is_relative_to(base):
            raise ModelError(f"tensor {tensor.name!r}: external location {location!r} links out of the model's folder")
        if not _is_file(real):
            raise ModelError(f"tensor {tensor.name!r}: external data file {folder / location} is missing")
        if tensor.data_type in _PACKED:
            raise ModelError(f"tensor {tensor.name!r}: external data of 4-bit types is not supported; embed it")
        wanted = _wanted_bytes(tensor)
        try:
            offset, length = int(info.get("offset", 0)), int(info.get("length", wanted))
        except ValueError as error:
            raise ModelError(f"tensor {tensor.name!r}: external offset and length must be integers") from error
        file = self.files.get(real) or self.files.setdefault(real, Stored(real))
        if offset < 0 or length != wanted or offset + length > file.size:
            raise ModelError(
                f"tensor {tensor.name!r}: needs {wanted} bytes at offset {offset} of {location}, "
                f"which has {file.size} (declared length {length})"
            )
        if wanted == 0:
            return np.zeros(tuple(tensor.dims), element_type(tensor.data_type))
        return self.array(tensor, file, offset)


def _inner_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Tensors in attributes, subgraphs and functions."""
    for graph in graphs_of(proto.graph):
        if graph is not proto.graph:
            yield from graph.initializer
        for node in graph.node:
            yield from (a.t for a in node.attribute if a.HasField("t"))
    for function in proto.functions:
        for node in function.node:
            yield from (a.t for a in node.attribute if a.HasField("t"))


def _require_sizes(tensor: TensorProto, elsewhere: int = 0) -> None:
    """Raise ModelError where dims are negative, or far beyond the data, of which some bytes may lie elsewhere."""
    dims = list(tensor.dims)
    if min(dims, default=0) < 0:
        raise ModelError(f"tensor {tensor.name!r}: dims {dims} are negative")
    lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    stored = elsewhere + len(tensor.raw_data) + len(tensor.string_data) + sum(map(len, lists))
    if tensor.data_location != TensorProto.EXTERNAL and math.prod(dims) > 8 * stored:
        raise ModelError(f"tensor {tensor.name!r}: there is not enough data for dims {dims}")


def _wanted_bytes(tensor: TensorProto) -> int:
    """Bytes that a tensor of its dims takes, but for those of less than a byte an element; ModelError for strings."""
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(f"tensor {tensor.name!r}: strings cannot lie in raw data")
    return int(math.prod(tensor.dims) * element_type(tensor.data_type).itemsize)


def _require_bytes(tensor: TensorProto, there: int) -> None:
    """Raise ModelError where a tensor has more or less bytes than its dims need."""
    wanted = _wanted_bytes(tensor)
    if wanted != there:
        raise ModelError(f"tensor {tensor.name!r}: dims {list(tensor.dims)} need {wanted} bytes, the file has {there}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _bytes_of(values: Array) -> memoryview:
    """The bytes of an array as they lie in `raw_data`."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _clear_external(tensor: TensorProto) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
