"""An ONNX model as it lies in the file: the proto without its large tensors, and the tensors beside it.

The proto is the truth and is edited in place; what is not edited is written back as it was read. Weights are kept
apart from the proto, so that copies of it are cheap and external data stays memory-mapped until somebody asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cpd_onnx.errors import ModelError
from cpd_onnx.wire import detached, joined

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Array: TypeAlias = npt.NDArray[Any]
Source: TypeAlias = "str | os.PathLike[str] | ModelProto | gs.Graph | Model"

_DETACH_BYTES = 1024
"""Tensors from this size on are held outside the proto."""
PROTO_LIMIT = 2**31 - 2**20
"""Bytes that one protobuf message may hold, with some room to spare."""
_PACKED = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.INT2, TensorProto.UINT2}
_PLAIN: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<f4"), TensorProto.INT64: np.dtype("<i8"), TensorProto.INT32: np.dtype("<i4"),
}  # fmt: skip  # a table
"""The commonest element types, as they lie in `raw_data`."""
_DEFAULT_DOMAINS = ("", "ai.onnx")


class Model:
    """A model proto and its tensors.

    Attributes:
        proto: the model; initializers whose data is detached have dims and type but no data.
        path: the file that it came from, if any.

    """

    def __init__(
        self, proto: ModelProto, data: dict[str, Array], path: Path | None = None, content: memoryview | None = None
    ) -> None:
        """Take a proto whose main-graph initializers named in `data` hold no data of their own.

        `content` is what was read from `path`.
        """
        self.proto = proto
        self.path = path
        self._data = data
        self._content = content
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

    def copy(self) -> Model:
        """Copy that can be edited without touching this one; tensors are shared until replaced."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        return Model(proto, dict(self._data), self.path)

    def sha256(self) -> str:
        """SHA-256 of the file that it was read from, or of its serialized proto; data files follow in order."""
        return hashlib.sha256(self.serialize()).hexdigest() if self._content is None else self._file_sha256

    @cached_property
    def _file_sha256(self) -> str:
        digest = hashlib.sha256(self._content or b"")
        if self.is_external:
            for tensor in self.graph.initializer:
                digest.update(_bytes_of(self.array(tensor.name)) if tensor.dims else b"")
        return digest.hexdigest()

    def has(self, name: str) -> bool:
        """Whether the main graph has an initializer of that name."""
        return name in self._initializers

    def tensor(self, name: str) -> TensorProto:
        """The initializer's proto, perhaps without data."""
        found: TensorProto = self._initializers[name]
        return found

    def array(self, name: str) -> Array:
        """Values of a main-graph initializer; do not write into it."""
        if name in self._data:
            return self._data[name]
        return to_array(self._initializers[name])

    def set_array(self, name: str, values: Array) -> None:
        """Replace the values (and dims) of a main-graph initializer; the element type must stay."""
        tensor = self._initializers[name]
        if values.dtype != element_type(tensor.data_type):
            raise TypeError(f"initializer {name!r} is {element_type(tensor.data_type)}, not {values.dtype}")
        if name in self._data:
            del tensor.dims[:]
            tensor.dims.extend(values.shape)
            self._data[name] = np.ascontiguousarray(values)
        else:
            replace_values(tensor, values)

    def add_initializer(self, name: str, values: Array) -> None:
        """Append an initializer to the main graph."""
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        self._initializers[name] = tensor

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
                tensor.raw_data = self._data[tensor.name].tobytes()
        return proto

    def data_bytes(self) -> int:
        """Bytes that the detached tensors take."""
        return sum(array.nbytes for array in self._data.values())

    def serialize(self) -> bytes:
        """The whole model as one protobuf message."""
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        """The message in pieces, none of which copies a large tensor."""
        if self.data_bytes() + self.proto.ByteSize() > PROTO_LIMIT:
            raise ModelError("the model is over 2 GiB and cannot be one message: save it with external data instead")
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        data: dict[int, memoryview] = {}
        for number, tensor in enumerate(proto.graph.initializer):
            if tensor.name in self._data:
                _clear_external(tensor)
                tensor.raw_data = b""
                data[number] = _bytes_of(self._data[tensor.name])
        return joined(proto.SerializeToString(), data)

    def files(self, path: str | os.PathLike[str]) -> list[Path]:
        """The files that `save` writes for a path: the model, and its data where that lies apart."""
        target = Path(path)
        apart = self.is_external or self.data_bytes() + self.proto.ByteSize() > PROTO_LIMIT
        return [target, *([target.with_name(target.name + ".data")] if apart else [])]

    def defect(self) -> str | None:
        """What onnx's checker has to say against the model, in one line; None if it is valid (or over 2 GiB)."""
        if self.data_bytes() + self.proto.ByteSize() > PROTO_LIMIT:
            return None
        try:
            onnx.checker.check_model(self.complete_proto(), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError) as error:
            return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
        return None

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model; weights go to `<name>.data` beside it if they came from such a file, or over 2 GiB.

        Raises ModelError if a file is there and `overwrite` is not set, or the folder cannot be written.
        Each file appears complete or not at all.
        """
        target, *beside = self.files(path)
        for file in (target, *beside):
            require_free(file, overwrite=overwrite)
        if not beside:
            with _replacing(target) as stream:
                for piece in self._pieces():
                    stream.write(piece)
            return
        side = beside[0]
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        # Mapped source data may be the very file that is replaced, so the data file is complete before it moves.
        with _replacing(side) as stream:
            offset = 0
            for tensor in proto.graph.initializer:
                if tensor.name not in self._data:
                    continue
                offset = -(-offset // 4096) * 4096
                stream.seek(offset)
                raw = _bytes_of(self._data[tensor.name])
                stream.write(raw)
                _point_to(tensor, side.name, offset, len(raw))
                offset += len(raw)
        write_atomically(target, proto.SerializeToString())


def load(source: Source) -> Model:
    """Read a model from a path, a ModelProto, an onnx-graphsurgeon graph, or pass a Model through.

    Raises ModelError for a file that is missing, broken, or whose external data is missing or leaves its folder.
    """
    if isinstance(source, Model):
        return source
    path, content = None, None
    places: dict[int, tuple[int, int]] = {}
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        content = _mapped(path)
        proto, places = _parse(path, content)
    elif isinstance(source, ModelProto):
        proto = ModelProto()
        proto.CopyFrom(source)
    else:
        import onnx_graphsurgeon as gs

        if not isinstance(source, gs.Graph):
            raise TypeError(
                f"a model is a path, a ModelProto or an onnx_graphsurgeon.Graph, not {type(source).__name__}"
            )
        proto = gs.export_onnx(source)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path or 'the model'}: the graph is empty; is this an ONNX model?")
    try:
        model = Model(proto, {}, path, content)
        _detach(model, content, places)
        model.names()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path or 'the model'} has names that are not text: export or copy it again") from error
    return model


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs in attributes of its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for body in bodies_of(node).values():
            yield from graphs_of(body)


def bodies_of(node: NodeProto) -> dict[str, GraphProto]:
    """The subgraphs of a node by attribute name."""
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


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
    """The numpy type of an ONNX element type."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


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
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r}: its data does not fit dims {list(tensor.dims)} ({error})") from error


def replace_values(tensor: TensorProto, values: Array) -> None:
    """Put new values into a tensor proto, everything else as it was."""
    made = numpy_helper.from_array(np.ascontiguousarray(values), tensor.name)
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data", "raw_data"):
        tensor.ClearField(field)
    del tensor.dims[:]
    tensor.dims.extend(values.shape)
    tensor.raw_data = made.raw_data


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise ModelError where writing to `path` would lose a file or has no folder to go to."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise ModelError(f"{path} exists: choose another name or allow overwriting with --force")
    if not path.parent.is_dir():
        raise ModelError(f"folder {path.parent} does not exist: create it first")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with _replacing(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A stream to a temporary neighbour that takes the place of `path` when all went well."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise ModelError(f"cannot write to folder {path.parent}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error.strerror}") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mapped(path: Path) -> memoryview:
    """The content of a file, memory-mapped where that can be done."""
    try:
        with path.open("rb") as stream:
            try:
                return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError):  # not a regular file, or an empty one
                return memoryview(stream.read())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; give the path of an .onnx file") from error


def _parse(path: Path, content: memoryview) -> tuple[ModelProto, dict[int, tuple[int, int]]]:
    """The message without its large tensors, and where in the content these lie."""
    small, places = detached(content, _DETACH_BYTES) or (content, {})
    proto = ModelProto()
    try:
        proto.ParseFromString(small)
    except DecodeError as error:
        raise ModelError(f"{path} is not a whole ONNX file ({error}): export or copy it again") from error
    return proto, places


def _detach(model: Model, content: memoryview | None, places: dict[int, tuple[int, int]]) -> None:
    """Keep large tensors apart from the proto and map external ones."""
    folder = model.path.parent if model.path else None
    for number, tensor in enumerate(model.graph.initializer):
        if number in places and content is not None:
            start, end = places[number]
            raw: npt.NDArray[np.uint8] = np.frombuffer(content, np.uint8, end - start, start)
        else:
            raw = np.frombuffer(tensor.raw_data, np.uint8)
        if tensor.data_location == TensorProto.EXTERNAL:
            model._data[tensor.name] = _map_external(tensor, folder)
        elif tensor.data_type not in _PACKED and len(raw) >= _DETACH_BYTES:
            model._data[tensor.name] = _view(tensor, raw)
            tensor.ClearField("raw_data")
        elif number in places:
            tensor.raw_data = raw.tobytes()
    for tensor in _inner_tensors(model.proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            values = _map_external(tensor, folder)
            _clear_external(tensor)
            tensor.raw_data = values.tobytes()


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


def _view(tensor: TensorProto, raw: npt.NDArray[np.uint8]) -> Array:
    dtype, shape = element_type(tensor.data_type), tuple(tensor.dims)
    wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if min(shape, default=1) < 0 or wanted != raw.nbytes:
        raise ModelError(f"tensor {tensor.name!r}: dims {list(shape)} need {wanted} bytes, the file has {raw.nbytes}")
    return raw.view(dtype).reshape(shape)


def _map_external(tensor: TensorProto, folder: Path | None) -> Array:
    """Memory-map a tensor's data file, which must be a regular file inside the model's folder."""
    if folder is None:
        raise ModelError(f"tensor {tensor.name!r} lies in an external file: load the model from its path")
    info = {e.key: e.value for e in tensor.external_data}
    location = info.get("location", "")
    base, real = folder.resolve(), (folder / location).resolve()
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"tensor {tensor.name!r}: external location {location!r} leaves the model's folder")
    if not real.is_relative_to(base):
        raise ModelError(f"tensor {tensor.name!r}: external location {location!r} links out of the model's folder")
    if not real.is_file():
        raise ModelError(f"tensor {tensor.name!r}: external data file {folder / location} is missing")
    if tensor.data_type in _PACKED:
        raise ModelError(f"tensor {tensor.name!r}: external data of 4-bit types is not supported; embed it")
    dtype = element_type(tensor.data_type)
    wanted = int(np.prod(tuple(tensor.dims), dtype=object)) * dtype.itemsize
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", wanted))
    except ValueError as error:
        raise ModelError(f"tensor {tensor.name!r}: external offset and length must be integers") from error
    if offset < 0 or length != wanted or offset + length > real.stat().st_size:
        raise ModelError(
            f"tensor {tensor.name!r}: needs {wanted} bytes at offset {offset} of {location}, "
            f"which has {real.stat().st_size} (declared length {length})"
        )
    if wanted == 0:
        return np.zeros(tuple(tensor.dims), dtype)
    raw = np.memmap(real, np.uint8, "r", offset, (length,))
    return _view(tensor, np.asarray(raw))


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
