"""Take large tensors out of a serialized model and put them back in without copying them, on protobuf's wire format.

`detached` returns a model's bytes without the raw data of its large initializers, and the position of that data;
`joined` puts data back in. Between the two is a message without weights, which protobuf reads and writes in
milliseconds. See https://protobuf.dev/programming-guides/encoding, and onnx/onnx.proto for the field numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Buffer: TypeAlias = "bytes | memoryview[int]"

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of `ModelProto.graph`, `GraphProto.initializer` and `TensorProto.raw_data` (onnx.proto)."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types (protobuf encoding specification)."""


@dataclass(frozen=True, slots=True)
class _Field:
    """One field of a message: its number and wire type, and the positions of its tag and its content."""

    number: int
    kind: int
    tag: int
    start: int
    end: int


def detached(content: Buffer, least: int) -> tuple[bytes, dict[int, tuple[int, int]]] | None:
    """Return a model's bytes without raw data of `least` bytes or more, and (start, end) of that data by initializer.

    None if the bytes are not a model, or not laid out as writers of ONNX files do it.
    """
    try:
        graph = _only(content, 0, len(content), _GRAPH)
        if graph is None:
            return None
        places: dict[int, tuple[int, int]] = {}
        parts: list[bytes] = []
        done, number = graph.start, -1
        for tensor in _fields(content, graph.start, graph.end):
            number += tensor.number == _INITIALIZER
            if tensor.number != _INITIALIZER or tensor.kind != _BYTES or tensor.end - tensor.start < least:
                continue
            raw = _only(content, tensor.start, tensor.end, _RAW_DATA)
            if raw is None or raw.end - raw.start < least:
                continue
            places[number] = (raw.start, raw.end)
            rest = bytes(content[tensor.start : raw.tag]) + bytes(content[raw.end : tensor.end])
            parts += [bytes(content[done : tensor.tag]), _header(_INITIALIZER, len(rest)), rest]
            done = tensor.end
        body = b"".join([*parts, bytes(content[done : graph.end])])
    except (IndexError, ValueError):
        return None
    head, tail = bytes(content[: graph.tag]), bytes(content[graph.end :])
    return b"".join([head, _header(_GRAPH, len(body)), body, tail]), places


def joined(content: bytes, lengths: Mapping[int, int]) -> Iterator[bytes | int]:
    """Yield the bytes of a model in chunks, with raw data of the given lengths in place of empty raw data.

    A chunk that is an integer stands for the raw data of the initializer at that position; the caller supplies it.
    Raises ValueError if one of the initializers in `lengths` has no empty `raw_data` field.
    """
    graph = _only(content, 0, len(content), _GRAPH)
    if graph is None:
        yield content
        return
    pieces: list[bytes | int] = []
    size = 0
    done, number = graph.start, -1
    for tensor in _fields(content, graph.start, graph.end):
        number += tensor.number == _INITIALIZER
        if tensor.number != _INITIALIZER or number not in lengths:
            continue
        raw = _only(content, tensor.start, tensor.end, _RAW_DATA)
        if raw is None or raw.start != raw.end:
            raise ValueError(f"initializer {number} has no empty raw_data field to fill")
        length = lengths[number]
        before = content[tensor.start : raw.tag] + _header(_RAW_DATA, length)
        after = content[raw.end : tensor.end]
        start = content[done : tensor.tag] + _header(_INITIALIZER, len(before) + length + len(after)) + before
        pieces += [start, number, after]
        size += len(start) + length + len(after)
        done = tensor.end
    pieces.append(content[done : graph.end])
    yield content[: graph.tag]
    yield _header(_GRAPH, size + graph.end - done)
    yield from pieces
    yield content[graph.end :]


def _only(content: Buffer, start: int, end: int, number: int) -> _Field | None:
    """Return the only field of that number; None if there is none, or several, which protobuf would merge."""
    found = [field for field in _fields(content, start, end) if field.number == number]
    return found[0] if len(found) == 1 and found[0].kind == _BYTES else None


def _fields(content: Buffer, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message in a range of bytes; raises ValueError or IndexError if it is truncated."""
    at = start
    while at < end:
        tag = at
        key, at = _varint(content, at)
        kind = key & 7
        if kind == _BYTES:
            length, at = _varint(content, at)
            after = at + length
        elif kind == _VARINT:
            _, after = _varint(content, at)
        elif kind in (_FIXED64, _FIXED32):
            after = at + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if after > end:
            raise ValueError("a field extends beyond the end of its message")
        yield _Field(key >> 3, kind, tag, at, after)
        at = after


def _varint(content: Buffer, at: int) -> tuple[int, int]:
    """Decode a varint, seven bits a byte; return its value and the position after it."""
    byte = content[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = content[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def _header(number: int, length: int) -> bytes:
    """Return the tag and length that precede a length-delimited field."""
    header, value = bytearray([number << 3 | _BYTES]), length
    while value >= 0x80:
        header.append(value & 0x7F | 0x80)
        value >>= 7
    header.append(value)
    return bytes(header)
