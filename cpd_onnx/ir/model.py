"""An ONNX model as stored in its file: the proto without its large tensors, and these tensors separately.

The proto is authoritative and is edited in place; what is not edited is written back as it was read. Large weights are
detached from the proto, so that copies of it are cheap. They are views of the memory-mapped file; those of a large
model are read or computed on each access instead, one at a time, and not cached.
"""

from __future__ import annotations

import contextlib
import copy
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
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from cpd_onnx.errors import CpdError, ModelError, ProofError, UnsupportedError
from cpd_onnx.io.files import (
    StoredFile,
    after_commit,
    atomic_stream,
    is_same_file,
    locked_folder,
    require_free,
    write_atomically,
)
from cpd_onnx.io.protowire import detached, joined
from cpd_onnx.summary import Summarised, Summary

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import onnx_ir

Array: TypeAlias = npt.NDArray[Any]
FunctionName: TypeAlias = tuple[str, str, str]
"""Domain, name and overload."""
ModelSource: TypeAlias = "str | os.PathLike[str] | ModelProto | gs.Graph | onnx_ir.Model | Model"

_DETACH_BYTES = 1024
"""Size in bytes from which a tensor is held outside the proto (heuristic)."""
_LARGE_BYTES = 1 << 28
"""Total size in bytes above which the weights of a model are read one at a time (heuristic)."""
_LAZY_BYTES = 1 << 16
"""Size in bytes from which a tensor of a large model is read on access; smaller ones are read at once (heuristic)."""
_ALIGNMENT = 4096
"""Alignment in bytes of tensors in data files, so that they can be memory-mapped (a page; see onnx.proto)."""
_PROTO_LIMIT = 2**31 - 2**20
"""Maximum size in bytes of one message: protobuf's limit of 2 GiB, less a margin of 1 MiB."""
_PACKED = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.INT2, TensorProto.UINT2}
"""Element types of less than a byte, several of which share a byte of `raw_data`."""
_PLAIN: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<f4"), TensorProto.INT64: np.dtype("<i8"), TensorProto.INT32: np.dtype("<i4"),
}  # fmt: skip  # a table
"""The most frequent element types and their little-endian numpy types, as in `raw_data`."""
PLACES = ("as-is", "inside", "beside")
"""Where the weights of a saved model are stored: as in its source, inside the file, or in a data file beside it."""
DEFAULT_DOMAINS = ("", "ai.onnx")
"""Names of the default operator domain."""


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor whose values are read or computed on each access.

    Attributes:
        dtype: Numpy type of the elements.
        shape: Sizes of the axes.
        make: Function that returns the values.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def materialize(values: Array | Lazy) -> Array:
    """Return the values as an array, reading or computing them if they are lazy."""
    return values.make() if isinstance(values, Lazy) else values


def map_lazy(values: Array | Lazy, shape: Iterable[int], function: Callable[[Array], Array]) -> Array | Lazy:
    """Apply a function to values: at once, or on each access if they are lazy; `shape` is that of its result."""
    if isinstance(values, Lazy):
        return Lazy(values.dtype, tuple(shape), lambda: function(values.make()))
    return function(values)


class Model(Summarised):
    """A model proto and its detached tensors.

    Attributes:
        proto: The model; detached initializers have dims and an element type but no data.
        path: File that the model was read from, if any.
        data_files: External data files that its weights were read from.
        free_io: Names of the graph inputs and outputs that may lose channels; all others keep their sizes.

    """

    def __init__(
        self, proto: ModelProto, data: dict[str, Array | Lazy], path: Path | None = None, file: StoredFile | None = None
    ) -> None:
        """Create a model from a proto, and the values of the main-graph initializers that have no data in it.

        `file` is the open file at `path`.
        """
        self.proto = proto
        self.path = path
        self.data_files: frozenset[Path] = frozenset()
        self.free_io: frozenset[str] = frozenset()
        self._data = data
        self._file = file
        self._initializers = {t.name: t for t in proto.graph.initializer}

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.proto.graph

    @property
    def opset(self) -> int:
        """Version of the default operator set; 1 if the model does not import it."""
        return next((o.version for o in self.proto.opset_import if o.domain in DEFAULT_DOMAINS), 1)

    @property
    def is_external(self) -> bool:
        """Whether some initializer is stored as external data."""
        return any(t.data_location == TensorProto.EXTERNAL for t in self.graph.initializer)

    def summary(self) -> Summary:
        """Return a summary of the model: operator set, numbers of nodes and initializers, inputs and outputs."""
        shapes = {
            kind: ", ".join(f"{i.name} {_dims(i)}" for i in entries if not self.has(i.name))
            for kind, entries in (("inputs", self.graph.input), ("outputs", self.graph.output))
        }
        return Summary.of({
            "model": str(self.path or self.graph.name), "opset": str(self.opset),
            "nodes": str(len(self.graph.node)), "initializers": str(len(self.graph.initializer)), **shapes,
        })  # fmt: skip  # a table

    def copy(self) -> Model:
        """Return a copy that can be edited independently; tensors are shared until they are replaced."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        copied = Model(proto, dict(self._data), self.path)
        copied.data_files, copied.free_io = self.data_files, self.free_io
        return copied

    def with_free_io(self, names: Iterable[str]) -> Model:
        """Return the same model, whose inputs and outputs of these names may lose channels."""
        same = copy.copy(self)
        same.free_io = frozenset(names)
        return same

    def sha256(self) -> str:
        """Return the SHA-256 of the file that the model was read from, followed by its external tensors in order.

        Of a model that was not read from a file it is that of the serialized proto.
        """
        return self._sha256 if self._file is not None else _digest(self._pieces())

    @cached_property
    def _sha256(self) -> str:
        assert self._file is not None
        apart = [t.name for t in self.graph.initializer if t.dims] if self.is_external else []
        return _digest(itertools.chain(self._file.chunks(), (_bytes_of(self.array(name)) for name in apart)))

    def has(self, name: str) -> bool:
        """Return whether the main graph has an initializer of that name."""
        return name in self._initializers

    def tensor(self, name: str) -> TensorProto:
        """Return the proto of a main-graph initializer, which has no data if it is detached."""
        found: TensorProto = self._initializers[name]
        return found

    def is_detached(self, name: str) -> bool:
        """Return whether the values of a main-graph initializer are held outside the proto."""
        return name in self._data

    def array(self, name: str) -> Array:
        """Return the values of a main-graph initializer; read-only for the caller."""
        return materialize(self.lazy_array(name))

    def lazy_array(self, name: str) -> Array | Lazy:
        """Return the values of a main-graph initializer, lazy if the model is large; read-only for the caller."""
        return self._data[name] if name in self._data else to_array(self._initializers[name])

    def set_array(self, name: str, values: Array | Lazy) -> None:
        """Replace the values and dims of a main-graph initializer; raises TypeError for another element type."""
        tensor = self._initializers[name]
        if values.dtype != element_type(tensor.data_type):
            raise TypeError(f"initializer {name!r} is {element_type(tensor.data_type)}, not {values.dtype}")
        if name in self._data:
            del tensor.dims[:]
            tensor.dims.extend(values.shape)
            self._data[name] = values if isinstance(values, Lazy) else np.ascontiguousarray(values)
        else:
            replace_values(tensor, materialize(values))

    def retype(self, name: str, values: Array | Lazy) -> None:
        """Replace a main-graph initializer by one of another element type."""
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
        """Remove an initializer from the main graph."""
        position = next(n for n, tensor in enumerate(self.graph.initializer) if tensor.name == name)
        del self.graph.initializer[position]
        self._data.pop(name, None)
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}

    def names(self) -> set[str]:
        """Return all value names in use, including those in subgraphs."""
        used: set[str] = set()
        for graph in graphs_of(self.graph):
            used.update(t.name for t in graph.initializer)
            used.update(v.name for v in graph.input)
            used.update(name for node in graph.node for name in (*node.input, *node.output))
        return used

    def complete_proto(self) -> ModelProto:
        """Return a copy of the proto with all data embedded; the model must be below 2 GiB."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            if tensor.name in self._data:
                _clear_external(tensor)
                tensor.raw_data = self.array(tensor.name).tobytes()
        return proto

    def data_bytes(self) -> int:
        """Return the total size of the detached tensors in bytes."""
        return sum(array.nbytes for array in self._data.values())

    def serialize(self) -> bytes:
        """Return the whole model as one protobuf message."""
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the message in chunks, without copying large tensors."""
        if self.is_over_limit:
            raise ModelError("the model exceeds the 2 GiB of one protobuf message: save it with external data instead")
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

    def size_bytes(self) -> int:
        """Return the size of the whole model in bytes, including its weights."""
        return self.data_bytes() + int(self.proto.ByteSize())

    @property
    def is_over_limit(self) -> bool:
        """Whether the model is too large for one protobuf message."""
        return self.size_bytes() > _PROTO_LIMIT

    def defect(self) -> str | None:
        """Return the first complaint of onnx's checker as one line; None if the model is valid or over 2 GiB."""
        if self.is_over_limit:
            return None
        try:
            onnx.checker.check_model(self.complete_proto(), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError) as error:
            return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
        return None

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False, weights: str = PLACES[0]) -> None:
        """Write the model atomically.

        Args:
            path: Path of the file.
            overwrite: Whether an existing file may be replaced.
            weights: One of `PLACES`; "as-is" stores them beside the model if they were external or exceed 2 GiB. The
                name of the data file contains the first digits of the SHA-256 of its content, so that the data of the
                model that is replaced stays valid until the new model is in place.

        Raises:
            ModelError: The file exists, the folder cannot be written to, or the model is too large for one file.
        """
        target = Path(path)
        require_free(target, overwrite=overwrite)
        is_beside = weights == "beside" or (weights == "as-is" and (self.is_external or self.is_over_limit))
        with locked_folder(target.parent):
            side = ""
            if is_beside:
                proto, side = self._save_data(target)
                write_atomically(target, proto.SerializeToString())
            else:
                with atomic_stream(target) as stream:
                    for piece in self._pieces():
                        stream.write(piece)
            after_commit(lambda: self._remove_older_data(target, side))

    def _remove_older_data(self, target: Path, side: str) -> None:
        """Remove data files of earlier models of that name, also those left by killed runs.

        Data files of the model that this one was derived from are spared: it may have been renamed from that name.
        """
        own = self.data_files if self.path is None or not is_same_file(self.path, target) else ()
        for file in target.parent.iterdir():
            is_older = re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{8}\.data", file.name) and file.name != side
            if is_older and file.resolve() not in own:
                file.unlink(missing_ok=True)

    def _save_data(self, target: Path) -> tuple[ModelProto, str]:
        """Write the data file; return the proto that refers to it, and its name."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        detached_tensors = [tensor for tensor in proto.graph.initializer if tensor.name in self._data]
        digest, places = hashlib.sha256(), list[tuple[int, int]]()

        def side() -> Path:
            return target.with_name(f"{target.name}.{digest.hexdigest()[:8]}.data")

        with atomic_stream(side) as stream:
            offset = 0
            for tensor in detached_tensors:
                raw, gap = _bytes_of(self.array(tensor.name)), -offset % _ALIGNMENT
                for piece in (bytes(gap), raw):
                    digest.update(piece)
                    stream.write(piece)
                places.append((offset + gap, len(raw)))
                offset += gap + len(raw)
        for tensor, place in zip(detached_tensors, places, strict=True):
            _point_to(tensor, side().name, *place)
        return proto, side().name


def _dims(entry: ValueInfoProto) -> str:
    """Return the declared shape of an input or output as text."""
    dims = entry.type.tensor_type.shape.dim
    return f"[{', '.join(dim.dim_param or str(dim.dim_value or '?') for dim in dims)}]"


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def load(source: ModelSource) -> Model:
    """Read a model from a path, a ModelProto, an onnx-graphsurgeon graph or an onnx-ir model; return a Model unchanged.

    Raises ModelError if the file is missing or corrupt, or its external data is missing or outside its folder.
    """
    if isinstance(source, Model):
        return source
    path, file = None, None
    places: dict[int, tuple[int, int]] = {}
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        file = StoredFile(path)
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
        raise ModelError(f"{path or 'the model'} has names that are not UTF-8: export or copy it again") from error
    return model


def in_form_of(source: ModelSource, model: Model) -> Any:
    """Return the model as an object of the kind that `load` was given; a Model for a path.

    For a kind other than a path or a Model, the model must be below 2 GiB.
    """
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
    """Return whether an object is a model of onnx-ir, in which case that library has been imported."""
    library = sys.modules.get("onnx_ir")
    return library is not None and isinstance(source, library.Model)


def _exported(source: Any) -> ModelProto:
    """Return the proto of a model in the representation of another library."""
    if _is_of_onnx_ir(source):
        library = sys.modules["onnx_ir"]
        proto: ModelProto = library.to_proto(library.external_data.load_to_model(source.clone()))
        return proto
    _require_onnx(source)
    import onnx_graphsurgeon as gs

    if not isinstance(source, gs.Graph):
        raise TypeError(
            "the model must be a path, a ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model, "
            f"got {type(source).__name__}"
        )
    exported: ModelProto = gs.export_onnx(source)
    return exported


_EXPORTS = {
    "torch": "torch.onnx.export(model, inputs, 'model.onnx', dynamo=True)",
    "keras": "model.export('model.onnx', format='onnx')",
    "tensorflow": "python -m tf2onnx.convert --saved-model FOLDER --output model.onnx",
    "jax": "jax2onnx.to_onnx(function, shapes)",
    "flax": "jax2onnx.to_onnx(model, shapes)",
    "sklearn": "skl2onnx.to_onnx(model, samples)",
}
"""How the models of frameworks become ONNX, by their packages."""
_CHECKPOINTS = {
    ".pt": "torch", ".pth": "torch", ".pt2": "torch", ".ckpt": "torch", ".bin": "torch", ".safetensors": "torch",
    ".keras": "keras", ".h5": "keras", ".pb": "tensorflow",
}  # fmt: skip  # a table
"""Endings of files that frameworks keep weights in."""


def _require_onnx(source: Any) -> None:
    """Raise UnsupportedError for the model of a framework, in memory or in a file of its own: it says how to export it.

    No framework is imported for that: the packages of the classes tell.
    """
    if isinstance(source, Path):
        what, package = str(source), _CHECKPOINTS.get(source.suffix.lower())
    else:
        homes = {cls.__module__.partition(".")[0] for cls in type(source).__mro__}
        what, package = f"a {type(source).__name__}", next((name for name in _EXPORTS if name in homes), None)
    if package is not None:
        raise UnsupportedError(f"{what} is a model of {package}, not ONNX: export it first, {_EXPORTS[package]}")


@contextlib.contextmanager
def translate_errors(model: Model) -> Iterator[None]:
    """Turn errors inside the block into ModelError if the model is not valid ONNX; other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CpdError) and not isinstance(error, ProofError):
            raise
        reason = "it has names that are not UTF-8" if isinstance(error, UnicodeError) else model.defect()
        if reason is None:
            raise
        raise ModelError(f"the model is not valid ONNX: {reason}") from error


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graph and all subgraphs of its nodes, outermost first."""
    yield graph
    for node in graph.node:
        for body in bodies_of(node).values():
            yield from graphs_of(body)


def bodies_of(node: NodeProto) -> dict[str, GraphProto]:
    """Return the subgraphs of a node by attribute name."""
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


def functions_of(proto: ModelProto) -> dict[FunctionName, FunctionProto]:
    """Return the local functions of a model by domain, name and overload."""
    return {(function.domain, function.name, function.overload): function for function in proto.functions}


def called_by(node: NodeProto) -> FunctionName:
    """Return the name under which a node would call a local function."""
    return (node.domain, node.op_type, node.overload)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node as Python values; strings decoded, tensors as TensorProto."""
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
    """Set an attribute, keeping its position if it is already present."""
    new = helper.make_attribute(name, value)
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.CopyFrom(new)
            return
    node.attribute.append(new)


def drop_attribute(node: NodeProto, name: str) -> None:
    """Remove an attribute if it is present."""
    for index, attribute in enumerate(node.attribute):
        if attribute.name == name:
            del node.attribute[index]
            return


def element_type(data_type: int) -> np.dtype[Any]:
    """Return the numpy type of an ONNX element type; raises ModelError for an unknown one."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))
    except KeyError as error:
        raise ModelError(
            f"element type {data_type} is unknown: export the model for onnx {onnx.__version__}"
        ) from error


def element_bytes(data_type: int) -> float:
    """Return the size in bytes of an element of an ONNX type in a file; 0 for strings, which vary in length."""
    if data_type in _PACKED:
        return 0.25 if data_type in (TensorProto.INT2, TensorProto.UINT2) else 0.5
    return 0.0 if data_type in (TensorProto.STRING, TensorProto.UNDEFINED) else float(element_type(data_type).itemsize)


def to_array(tensor: TensorProto) -> Array:
    """Return the values of a tensor whose data is in the proto."""
    kind = _PLAIN.get(tensor.data_type)
    if kind is not None and (raw := tensor.raw_data) and len(raw) == math.prod(tensor.dims) * kind.itemsize:
        return np.frombuffer(raw, kind).reshape(tuple(tensor.dims))
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"tensor {tensor.name!r}: its data does not fit dims {list(tensor.dims)} ({error})") from error


def constant_array(attribute: AttributeProto) -> Array | None:
    """Return the value that an attribute gives a Constant node; None unless it is a dense tensor of numbers."""
    if attribute.name == "value":
        return to_array(attribute.t)
    if attribute.name not in ("value_int", "value_ints", "value_float", "value_floats"):
        return None
    return np.asarray(helper.get_attribute_value(attribute), np.int64 if "int" in attribute.name else np.float32)


def replace_values(tensor: TensorProto, values: Array) -> None:
    """Replace the values and dims of a tensor proto; its other fields are unchanged."""
    new = numpy_helper.from_array(np.ascontiguousarray(values), tensor.name)
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data", "raw_data"):
        tensor.ClearField(field)
    del tensor.dims[:]
    tensor.dims.extend(values.shape)
    tensor.raw_data = new.raw_data


def _parse(path: Path, content: memoryview) -> tuple[ModelProto, dict[int, tuple[int, int]]]:
    """Return the message without the data of its large tensors, and the position of that data in the content."""
    small, places = detached(content, _DETACH_BYTES) or (content, {})
    proto = ModelProto()
    try:
        proto.ParseFromString(small)
    except DecodeError as error:
        _require_onnx(path)
        raise ModelError(f"{path} is not a complete ONNX file ({error}): export or copy it again") from error
    return proto, places


def _detach(model: Model, file: StoredFile | None, places: dict[int, tuple[int, int]]) -> None:
    """Move the data of large tensors out of the proto, and open external data."""
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
        _require_sizes(tensor)  # onnxruntime would crash
        if tensor.data_location == TensorProto.EXTERNAL:
            found = reader.external(tensor)
            _clear_external(tensor)
            tensor.raw_data = materialize(found).tobytes()
    model.data_files = frozenset(reader.files)


class _Reader:
    """Creates arrays from the file of a model and its external data files."""

    def __init__(self, model: Model, file: StoredFile | None) -> None:
        self._folder = model.path.parent if model.path else None
        external = (t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        total = (file.size if file else 0) + sum(_required_bytes(tensor) for tensor in external)
        self._is_large = total > _LARGE_BYTES
        self.files: dict[Path, StoredFile] = {}

    def array(self, tensor: TensorProto, file: StoredFile, start: int) -> Array | Lazy:
        """Return a tensor whose data starts at a position of a file."""
        dtype, shape, length = element_type(tensor.data_type), tuple(tensor.dims), _required_bytes(tensor)
        if not self._is_large:
            return np.frombuffer(file.content, np.uint8, length, start).view(dtype).reshape(shape)

        def read() -> Array:
            return file.read(start, length).view(dtype).reshape(shape)

        return Lazy(dtype, shape, read) if length >= _LAZY_BYTES else read()

    def external(self, tensor: TensorProto) -> Array | Lazy:
        """Return a tensor stored as external data, which must be in a regular file inside the model's folder."""
        folder = self._folder
        if folder is None:
            raise ModelError(f"tensor {tensor.name!r} is in an external file: load the model from its path")
        info = {e.key: e.value for e in tensor.external_data}
        location = info.get("location", "")
        if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise ModelError(f"tensor {tensor.name!r}: external location {location!r} is outside the model's folder")
        try:
            base, real = folder.resolve(), (folder / location).resolve()
        except (OSError, RuntimeError) as error:  # circular links
            raise ModelError(f"tensor {tensor.name!r}: external location {location!r} cannot be resolved") from error
        if not real.is_relative_to(base):
            raise ModelError(f"tensor {tensor.name!r}: external location {location!r} links out of the model's folder")
        if not _is_file(real):
            raise ModelError(f"tensor {tensor.name!r}: external data file {folder / location} is missing")
        if tensor.data_type in _PACKED:
            raise ModelError(f"tensor {tensor.name!r}: external data of 4-bit types is not supported; embed it")
        required = _required_bytes(tensor)
        try:
            offset, length = int(info.get("offset", 0)), int(info.get("length", required))
        except ValueError as error:
            raise ModelError(f"tensor {tensor.name!r}: external offset and length must be integers") from error
        file = self.files.get(real) or self.files.setdefault(real, StoredFile(real))
        if offset < 0 or length != required or offset + length > file.size:
            raise ModelError(
                f"tensor {tensor.name!r}: needs {required} bytes at offset {offset} of {location}, "
                f"which has {file.size} (declared length {length})"
            )
        if required == 0:
            return np.zeros(tuple(tensor.dims), element_type(tensor.data_type))
        return self.array(tensor, file, offset)


def _inner_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Yield the tensors in attributes, subgraphs and functions."""
    for graph in graphs_of(proto.graph):
        if graph is not proto.graph:
            yield from graph.initializer
        for node in graph.node:
            yield from (a.t for a in node.attribute if a.HasField("t"))
    for function in proto.functions:
        for node in function.node:
            yield from (a.t for a in node.attribute if a.HasField("t"))


def _require_sizes(tensor: TensorProto, elsewhere: int = 0) -> None:
    """Raise ModelError if dims are negative or need far more data than there is, `elsewhere` bytes of it detached."""
    dims = list(tensor.dims)
    if min(dims, default=0) < 0:
        raise ModelError(f"tensor {tensor.name!r}: dims {dims} are negative")
    lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    stored = elsewhere + len(tensor.raw_data) + len(tensor.string_data) + sum(map(len, lists))
    if tensor.data_location != TensorProto.EXTERNAL and math.prod(dims) > 8 * stored:
        raise ModelError(f"tensor {tensor.name!r}: there is not enough data for dims {dims}")


def _required_bytes(tensor: TensorProto) -> int:
    """Return the size in bytes of the raw data of a tensor, packed element types excepted; ModelError for strings."""
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(f"tensor {tensor.name!r}: strings cannot be stored as raw data")
    return int(math.prod(tensor.dims) * element_type(tensor.data_type).itemsize)


def _require_bytes(tensor: TensorProto, available: int) -> None:
    """Raise ModelError if a tensor has more or fewer bytes than its dims need."""
    required = _required_bytes(tensor)
    if required != available:
        raise ModelError(
            f"tensor {tensor.name!r}: dims {list(tensor.dims)} need {required} bytes, the file has {available}"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # an invalid file name
        return False


def _bytes_of(values: Array) -> memoryview:
    """Return the bytes of an array as in `raw_data`."""
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
