"""Models without the data of their large tensors, and whole again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from cpd_onnx.io.protowire import detached, joined
from cpd_onnx.ir.model import load

LEAST = 64


def a_model(sizes: list[int], doc: str = "") -> ModelProto:
    """A model with initializers of some sizes, one of them with fields on both sides of its data."""
    tensors = [numpy_helper.from_array(np.arange(size, dtype=np.float32), f"w{i}") for i, size in enumerate(sizes)]
    for tensor in tensors[:1]:
        tensor.doc_string = doc
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [info], [info], tensors)
    graph.output[0].name = "y"
    return helper.make_model(graph, doc_string=doc)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=6), st.text(max_size=200))
def test_apart_and_together_again(sizes: list[int], doc: str) -> None:
    model = a_model(sizes, doc)
    content = model.SerializeToString()
    apart = detached(content, LEAST)
    assert apart is not None
    small, places = apart
    assert sorted(places) == [i for i, size in enumerate(sizes) if 4 * size >= LEAST]
    proto = ModelProto.FromString(small)
    for number, tensor in enumerate(proto.graph.initializer):
        raw = content[slice(*places[number])] if number in places else tensor.raw_data
        assert raw == model.graph.initializer[number].raw_data
        if number in places:
            assert not tensor.HasField("raw_data")
            tensor.raw_data = b""
    lengths = {number: end - start for number, (start, end) in places.items()}
    pieces = joined(proto.SerializeToString(), lengths)
    assert b"".join(content[slice(*places[p])] if isinstance(p, int) else p for p in pieces) == content


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_left_to_protobuf(data: Any) -> None:
    content = bytearray(a_model([100, 3, 40]).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    apart = detached(cut, LEAST)
    if apart is not None:
        small, places = apart
        assert len(small) <= len(cut)
        assert all(0 <= start <= end <= len(cut) for start, end in places.values())


def test_a_graph_in_two_pieces_is_left_to_protobuf() -> None:
    content = a_model([100]).SerializeToString()
    assert detached(content + content, LEAST) is None


def test_data_needs_a_place() -> None:
    with pytest.raises(ValueError, match="no empty raw_data"):
        list(joined(a_model([100]).SerializeToString(), {0: 4}))


def test_a_file_that_nobody_edits_keeps_its_bytes(tmp_path: Any) -> None:
    path, copy = tmp_path / "a.onnx", tmp_path / "b.onnx"
    path.write_bytes(a_model([1000, 2, 500], "doc").SerializeToString())
    load(path).save(copy)
    assert path.read_bytes() == copy.read_bytes()
