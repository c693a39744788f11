"""Profiles: the capabilities of a target as data, and the check of a model against them.

Built-in profiles are in `profiles.toml`; a user's own TOML file has the same keys at its top level. The note of each
profile states the source of its values.
"""

from __future__ import annotations

import fnmatch
import importlib.resources
import reprlib
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onnx import GraphProto, NodeProto, TensorProto

from cpd_onnx.data.sources import fixed_batch, inputs_of
from cpd_onnx.errors import TargetError
from cpd_onnx.io.files import read_text, translate_read_errors
from cpd_onnx.ir.model import DEFAULT_DOMAINS, Model, called_by, functions_of, graphs_of, materialize
from cpd_onnx.ops.traits import traits_of

DTYPES = ("float32", "float16", "bfloat16", "int8")
"""Element types of weights that a target may prefer."""
ACTIVATIONS = ("uint8", "int8")
"""Element types of quantised activations that a target may require."""
_FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"
}  # fmt: skip  # a table


@dataclass(frozen=True)
class Profile:
    """The capabilities of a target.

    Attributes:
        name: Name of the target.
        multiple: Number of which widths should be multiples.
        opset: Newest supported version of the default operator set; None if any is supported.
        ir: Newest supported IR version; None if any is supported.
        allows: Supported operators, "domain::Operator" outside the default domain, with * and ? as wildcards; all if
            empty.
        lacks: Unsupported operators, in the same notation.
        batch: Required batch size; None if any is supported.
        fixed_shapes: Whether all sizes of the inputs must be static.
        dtype: Preferred element type of the weights, one of `DTYPES`.
        activations: Element type of quantised activations, one of `ACTIVATIONS`.
        symmetric: Whether zero points must be zero.
        reduce_range: Whether quantised weights should use seven bits only.
        quantized_bias: Whether biases of quantised models may be int32.
        note: Source of these values.

    """

    name: str
    multiple: int = 1
    opset: int | None = None
    ir: int | None = None
    allows: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    batch: int | None = None
    fixed_shapes: bool = False
    dtype: str = "float32"
    activations: str = "uint8"
    symmetric: bool = False
    reduce_range: bool = False
    quantized_bias: bool = True
    note: str = ""


_CHOICES = {"dtype": DTYPES, "activations": ACTIVATIONS}


def profile_names() -> tuple[str, ...]:
    """Return the names of the built-in profiles."""
    return tuple(_built_in())


def load_profile(name_or_path: str | Path) -> Profile:
    """Return a built-in profile by its name, or a profile from a TOML file.

    Raises:
        TargetError: There is no profile of that name, the file cannot be read, or it has an unknown key or a value of
            the wrong type.
    """
    known = _built_in()
    if str(name_or_path) in known:
        return _profile(str(name_or_path), known[str(name_or_path)], "the profile")
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise TargetError(f"no profile is called {str(name_or_path)!r}: choose {', '.join(known)} or give a .toml file")
    with translate_read_errors(path, "profile", f"{path} is not a TOML file", TargetError):
        content = tomllib.loads(read_text(path))
    name = content.pop("name", path.stem)
    if not isinstance(name, str):
        raise TargetError(f"{path}: name = {reprlib.repr(name)}: must be a string")
    return _profile(name, content, str(path))


def _built_in() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("cpd_onnx.deploy").joinpath("profiles.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _profile(name: str, content: Mapping[str, Any], where: str) -> Profile:
    """Return the profile in a TOML table."""
    kinds = {field.name: str(field.type) for field in fields(Profile) if field.name != "name"}
    for key, value in content.items():
        if key not in kinds:
            raise TargetError(f"{where}: no profile has a key {key!r}; the keys are {', '.join(kinds)}")
        _require(f"{where}: {key} = {reprlib.repr(value)}", key, value, kinds[key])
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    return Profile(name, **{**content, **lists})


def _require(entry: str, key: str, value: Any, kind: str) -> None:
    """Raise TargetError if a value does not have the type that its key requires."""
    if kind == "bool" and not isinstance(value, bool):
        raise TargetError(f"{entry}: must be true or false")
    if kind.startswith("int") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise TargetError(f"{entry}: must be an integer of at least 1")
    if kind == "str" and not isinstance(value, str):
        raise TargetError(f"{entry}: must be a string")
    if kind.startswith("tuple") and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise TargetError(f"{entry}: must be a list of operators, as in ['Conv', 'com.microsoft::*']")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise TargetError(f"{entry}: must be one of {', '.join(_CHOICES[key])}")


def problems(model: Model, profile: Profile) -> list[str]:
    """Return the reasons why a model does not fit a profile, one sentence each; empty if it fits."""
    return [
        *_versions(model, profile),
        *_operators(model, profile),
        *_sizes(model, profile),
        *_types(model, profile),
        *_quantisers(model, profile),
    ]


def _versions(model: Model, profile: Profile) -> Iterator[str]:
    if profile.opset is not None and model.opset > profile.opset:
        yield f"opset {model.opset} is newer than {profile.opset}, the newest of {profile.name}"
    if profile.ir is not None and model.proto.ir_version > profile.ir:
        yield f"IR version {model.proto.ir_version} is newer than {profile.ir}, the newest of {profile.name}"


def _operators(model: Model, profile: Profile) -> Iterator[str]:
    found: dict[str, list[NodeProto]] = defaultdict(list)
    functions = functions_of(model.proto)
    for node in _all_nodes(model):
        if called_by(node) not in functions:
            found[operator_of(node)].append(node)
    for operator in sorted(found):
        lacks = any(fnmatch.fnmatchcase(operator, pattern) for pattern in profile.lacks)
        if lacks or (profile.allows and not any(fnmatch.fnmatchcase(operator, pattern) for pattern in profile.allows)):
            first, *others = found[operator]
            more = f" and {len(others)} more" if others else ""
            yield f"{profile.name} has no operator {operator}: node {_name_of(first)!r}{more}"


def operator_of(node: NodeProto) -> str:
    """Return the operator of a node in the notation of profiles: with its domain, unless that is the default one."""
    return str(node.op_type) if node.domain in DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}"


def _name_of(node: NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)


def _all_nodes(model: Model) -> Iterator[NodeProto]:
    """Yield the nodes of all graphs and functions, including subgraphs."""
    for graph in graphs_of(model.graph):
        yield from graph.node
    for function in model.proto.functions:
        body = GraphProto(node=function.node)
        for graph in graphs_of(body):
            yield from graph.node


def _sizes(model: Model, profile: Profile) -> Iterator[str]:
    inputs = inputs_of(model.proto)
    if profile.fixed_shapes:
        for entry in inputs:
            if entry.shape is None or not all(isinstance(size, int) for size in entry.shape):
                yield f"input {entry.name!r} is {entry}: {profile.name} requires static sizes"
    batch = fixed_batch([entry for entry in inputs if entry.shape][:1])
    if profile.batch is not None and batch is not None and batch != profile.batch:
        yield f"the model has batch size {batch}, {profile.name} requires {profile.batch}"


def _types(model: Model, profile: Profile) -> Iterator[str]:
    """Check the element type that most weights have against the preferred one."""
    sizes: dict[int, int] = defaultdict(int)
    for tensor in model.graph.initializer:
        size = 1
        for dim in tensor.dims:
            size *= dim
        sizes[tensor.data_type] += size
    kind = _FLOATS.get(max(sizes, key=lambda number: sizes[number])) if sizes else None
    if kind == "float32" and profile.dtype != "float32":
        yield f"most weights are float32, {profile.name} is designed for {profile.dtype}"


def _quantisers(model: Model, profile: Profile) -> Iterator[str]:
    """Check the quantisation scheme of a model."""
    if profile.activations == "uint8" and not profile.symmetric and profile.quantized_bias:
        return
    unsigned, shifted, biases = [], [], []
    for node in (n for n in model.graph.node if traits_of(n).is_quantizer):
        number, zero = _stored(model, node, 0), _stored(model, node, 2)
        kind = zero if zero is not None else number
        if kind is None or kind.data_type == TensorProto.UINT8:
            unsigned.append(node)
        if zero is not None and materialize(model.lazy_array(zero.name)).any():
            shifted.append(node)
        if number is not None and number.data_type == TensorProto.INT32:
            biases.append(node)
    if profile.activations == "int8" and unsigned:
        yield f"{len(unsigned)} tensors are quantised to uint8, the first at {_name_of(unsigned[0])!r}: give int8"
    if profile.symmetric and shifted:
        yield f"{len(shifted)} zero points are not zero, the first at {_name_of(shifted[0])!r}: quantise symmetrically"
    if not profile.quantized_bias and biases:
        yield f"{len(biases)} biases are int32, the first at {_name_of(biases[0])!r}: leave biases float"


def _stored(model: Model, node: NodeProto, slot: int) -> TensorProto | None:
    """Return the initializer at an input of a node; None if the input is not an initializer."""
    name = node.input[slot] if slot < len(node.input) else ""
    return model.tensor(name) if model.has(name) else None
