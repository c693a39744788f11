"""Data sources: what they give, and what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, TensorProto, parser

from cpd_onnx.data.sources import (
    LABELS,
    ArraySource,
    FunctionSource,
    ImageOptions,
    RandomOptions,
    RandomSource,
    Source,
    fixed_batch,
    inputs_of,
    open_source,
    read_npz,
    steps_per_pass,
)
from cpd_onnx.errors import DataError

Array = npt.NDArray[Any]


def model(inputs: str) -> ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => (float[N] y) {{ y = Foo() }}')


IMAGES = model("float[N,3,4,6] x")


def images(count: int) -> dict[str, Array]:
    return {"x": np.arange(count * 72, dtype=np.float32).reshape(count, 3, 4, 6), LABELS: np.arange(count)}


def rows(source: Source, size: int, seed: int | None = None) -> list[list[int]]:
    return [batch[LABELS].tolist() for batch in source.batches(size, seed=seed)]


# Signatures.


def test_inputs_are_listed_without_initializers() -> None:
    proto = parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 17]> g (int64[N,T] ids, float[2] w, bool flag) => (float[N] y) '
        "<float[2] w = {1,2}> { y = Foo() }"
    )
    assert [str(entry) for entry in inputs_of(proto)] == ["int64[N,T]", "bool[]"]


def test_unknown_sizes_and_ranks() -> None:
    proto = model("float[N,3] x")
    proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    assert str(inputs_of(proto)[0]) == "float32[?,3]"
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert str(inputs_of(proto)[0]) == "float32[...]"


def test_input_that_is_no_tensor_is_refused() -> None:
    proto = model("float[N] x")
    proto.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(DataError, match="'x' is not a tensor"):
        inputs_of(proto)


def test_fixed_batch() -> None:
    assert fixed_batch(inputs_of(model("float[4,3] x, float[4] z, float s"))) == 4
    assert fixed_batch(inputs_of(model("float[N,3] x"))) is None
    with pytest.raises(DataError, match=r"different sizes \[2, 4\]"):
        fixed_batch(inputs_of(model("float[4,3] x, float[2] z")))


# Arrays.


def test_every_sample_comes_once() -> None:
    source = ArraySource(images(7))
    assert rows(source, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    shuffled = rows(source, 3, seed=1)
    assert sorted(itertools.chain(*shuffled)) == list(range(7))
    assert shuffled == rows(source, 3, seed=1)
    assert shuffled != rows(source, 3, seed=2)


def test_arrays_stay_together() -> None:
    for batch in ArraySource(images(7)).batches(2, seed=4):
        assert np.array_equal(batch["x"][:, 0, 0, 0] / 72, batch[LABELS])


def test_scalar_goes_into_every_batch() -> None:
    source = ArraySource({"x": np.zeros(3), "rate": np.array(16000)})
    assert [batch["rate"].item() for batch in source.batches(2)] == [16000, 16000]


def test_uneven_and_empty_arrays_are_refused() -> None:
    with pytest.raises(DataError, match="'x' 3, 'z' 4"):
        ArraySource({"x": np.zeros(3), "z": np.zeros(4)})
    with pytest.raises(DataError, match="no samples"):
        ArraySource({"x": np.zeros((0, 3))})
    with pytest.raises(DataError, match="nothing"):
        ArraySource({})
    with pytest.raises(ValueError, match="batch size"):
        next(ArraySource(images(2)).batches(0))


def test_npz_is_opened_and_checked(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **images(5))  # type: ignore[arg-type]  # numpy's own keyword is of another type
    source = open_source(tmp_path / "data.npz", IMAGES)
    assert source.count == 5
    assert rows(source, 5) == [[0, 1, 2, 3, 4]]
    assert steps_per_pass(source, 2) == 2
    assert steps_per_pass(source, 64) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((2, 3, 4, 6), np.float32)}, r"the data contains 'y' but the model's inputs are 'x'"),
        ({LABELS: np.zeros(2)}, r"the data contains nothing but the model's inputs are 'x'"),
        ({"x": np.zeros((2, 3, 4, 6))}, r"array 'x' is float64 but the model's input is float32\[N,3,4,6\]"),
        ({"x": np.zeros((2, 4, 6, 3), np.float32)}, r"array 'x' is float32\[batch,4,6,3\] but the model's input is"),
        ({"x": np.zeros((2, 3, 24), np.float32)}, r"array 'x' is float32\[batch,3,24\] but"),
    ],
)
def test_data_that_does_not_fit_is_refused(arrays: dict[str, Array], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(ArraySource(arrays), IMAGES)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        open_source(tmp_path / "data.npz", IMAGES)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    refused: dict[str | Path, str] = {
        tmp_path / "broken.npz": "cannot be read",
        tmp_path / "missing.npz": "there is no file",
        "nothing": "give an .npz file, a folder of images or module:function",
        "no.such.module:name": "cannot be imported",
        "math:pi": "is a float, not a function",
        "math:nothing": "cannot be imported",
    }
    for data, message in refused.items():
        with pytest.raises(DataError, match=message):
            open_source(data, IMAGES)


# Folders of images.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for number in range(2):
            pixels = np.zeros((8, 12, 3), np.uint8)
            pixels[..., label] = 255
            image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_gives_prepared_images_and_classes(folder: Path) -> None:
    source = open_source(folder, IMAGES, ImageOptions(mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 2.0)))
    (batch,) = source.batches(4)
    assert batch["x"].shape == (4, 3, 4, 6)
    assert batch["x"].dtype == np.float32
    assert batch[LABELS].tolist() == [0, 0, 1, 1]
    assert batch["x"][:, :, 0, 0].tolist() == [[1.0, 0.0, 0.0]] * 2 + [[-1.0, 1.0, 0.0]] * 2


def test_folder_follows_the_models_layout(folder: Path) -> None:
    (batch,) = open_source(folder, model("uint8[N,H,W,3] x"), ImageOptions(order="BGR", size=(5, 7))).batches(4)
    assert batch["x"].shape == (4, 5, 7, 3)
    assert batch["x"][0, 0, 0].tolist() == [0, 0, 255]
    (grey,) = open_source(folder, model("float[N,1,4,6] x")).batches(4)
    assert grey["x"].shape == (4, 1, 4, 6)


def test_folder_without_classes_has_no_labels(folder: Path) -> None:
    (batch,) = open_source(folder / "cat", IMAGES).batches(2)
    assert set(batch) == {"x"}


def test_folder_that_does_not_fit_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for inputs, message in {
        "float[N,3,4,6] x, float[N] z": "feeds one input, but the model has 'x', 'z'",
        "float[N,5] x": "not images of 1 or 3 channels",
        "float[N,3,H,W] x": "set its dynamic axes",
    }.items():
        with pytest.raises(DataError, match=message):
            open_source(folder, model(inputs))
    with pytest.raises(DataError, match="contains no images"):
        open_source(tmp_path_factory.mktemp("empty"), IMAGES)
    (folder / "cat" / "0.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"0\.png' cannot be read"):
        open_source(folder, IMAGES)


# Functions.


def feeds(seed: int | None = None) -> Iterator[dict[str, Array]]:
    """What `module:function` names."""
    yield {"x": np.full((2, 3, 4, 6), seed or 0, np.float32)}


def lopsided() -> Iterator[dict[str, Array]]:
    yield {"x": np.zeros((1, 3, 4, 6), np.float32)}
    yield {"x": np.zeros((1, 3, 4, 5), np.float32)}


def nothing() -> Iterator[dict[str, Array]]:
    yield from ()


MODULE = """
import numpy
def two():
    for _ in range(2):
        yield {"x": numpy.zeros(1, "f")}
"""


def test_function_is_called_for_each_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_feeds.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    source = open_source("my_feeds:two", model("float[N] x"))
    assert source.count is None
    assert steps_per_pass(source, 1) is None
    assert [len(list(source.batches(9))) for _ in range(2)] == [2, 2]


def test_function_gets_the_seed_if_it_takes_one() -> None:
    source = FunctionSource(feeds, inputs_of(IMAGES))
    assert next(source.batches(1, seed=9))["x"][0, 0, 0, 0] == 9


def test_function_that_yields_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        open_source(FunctionSource(nothing, inputs_of(IMAGES)), IMAGES)
    source = open_source(FunctionSource(lopsided, inputs_of(IMAGES)), IMAGES)
    with pytest.raises(DataError, match=r"\[batch,3,4,5\]"):
        list(source.batches(1))


# Random data.


def test_random_data_fits_any_signature() -> None:
    proto = model("float16[N,3,H,W] x, int64[N,T] ids, bool[N] flag, int32 count")
    source = RandomSource(inputs_of(proto), RandomOptions(count=5, sizes=(("T", 7),), free=16))
    (batch,) = open_source(source, proto).batches(5)
    shapes = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert shapes == {
        "x": ("float16", (5, 3, 16, 16)),
        "ids": ("int64", (5, 7)),
        "flag": ("bool", (5,)),
        "count": ("int32", ()),
    }
    assert set(batch["ids"].ravel()) == {0, 1}


def test_random_samples_depend_on_seed_and_number_alone() -> None:
    inputs = inputs_of(IMAGES)
    whole = np.concatenate([batch["x"] for batch in RandomSource(inputs, RandomOptions(count=6)).batches(6)])
    parts = np.concatenate([batch["x"] for batch in RandomSource(inputs, RandomOptions(count=6)).batches(4)])
    other = np.concatenate([batch["x"] for batch in RandomSource(inputs, RandomOptions(count=6, seed=1)).batches(6)])
    assert np.array_equal(whole, parts)
    assert not np.array_equal(whole, other)


def test_random_data_needs_a_shape() -> None:
    proto = model("float[N] x")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(DataError, match="'x' has no known shape"):
        RandomSource(inputs_of(proto))


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    free, pixels = model("float[N,3,H,W] x"), np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the middle square of a wide image
    image_module = pytest.importorskip("PIL.Image")
    image_module.fromarray(pixels).save(tmp_path / "wide.png")
    (batch,) = open_source(tmp_path, free, ImageOptions(size=(20, 20), resize=20)).batches(1)
    (values,) = batch.values()
    assert values[..., 2:-2, 2:-2].min() == 1.0
    (squeezed,) = open_source(tmp_path, free, ImageOptions(size=(20, 20))).batches(1)
    assert next(iter(squeezed.values())).min() == 0.0
    with pytest.raises(DataError, match="too small to cut"):
        list(open_source(tmp_path, free, ImageOptions(size=(20, 20), resize=10)).batches(1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read_as_numpy_reads_them(tmp_path: Path, save: Any) -> None:
    arrays = {
        "x": np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32),
        "labels": np.arange(7),
        "scale": np.float32(3.0),
        "fortran": np.asfortranarray(np.arange(42.0).reshape(7, 6)),
        "empty": np.zeros((7, 0)),
    }
    save(tmp_path / "a.npz", **arrays)
    found = read_npz(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert isinstance(found["x"], np.memmap) == (save is np.savez)


def test_archives_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}, {}], dtype=object))
    with pytest.raises(DataError, match="cannot be read as"):
        read_npz(tmp_path / "a.npz")
