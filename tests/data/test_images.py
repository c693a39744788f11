"""Folders of images: presets, letterbox, class folders, masks, boxes and broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, parser

from cpd_onnx.data.images.folder import ImageFolder
from cpd_onnx.data.images.options import PRESETS, ImageOptions
from cpd_onnx.data.sources import LABELS, open_source
from cpd_onnx.errors import DataError

Array = npt.NDArray[Any]
image_module = pytest.importorskip("PIL.Image")


def model(inputs: str, output: str = "float[N] y") -> ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({output}) {{ y = Foo() }}')


IMAGES = model("float[N,3,4,6] x")


def save(path: Path, pixels: Any, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image_module.fromarray(np.asarray(pixels, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putdata(np.asarray(pixels, np.uint8).ravel().tolist())
        image.putpalette([200, 10, 10] * 256)
    image.save(path)
    return path


def colour(red: int, green: int = 0, blue: int = 0, size: tuple[int, int] = (4, 6)) -> Array:
    return np.broadcast_to(np.array([red, green, blue], np.uint8), (*size, 3))


def only(folder: Path, proto: ModelProto = IMAGES, **options: Any) -> dict[str, Array]:
    """All samples of a folder as one batch."""
    (batch,) = open_source(folder, proto, ImageOptions(**options)).batches(100)
    return batch


# Presets.


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("imagenet", [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]),
        ("0-1", [1, 0, 0]),
        ("0-255", [255, 0, 0]),
        ("-1..1", [1, -1, -1]),
        ("caffe", [-103.939, -116.779, 255 - 123.68]),
        ("yolo", [1, 0, 0]),
    ],
)
def test_preset_prepares_pixels(tmp_path: Path, preset: str, wanted: list[float]) -> None:
    save(tmp_path / "a.png", colour(255))
    np.testing.assert_allclose(only(tmp_path, preset=preset)["x"][0, :, 1, 1], wanted, rtol=1e-5)
    assert ImageOptions(preset=preset).name == preset


def test_given_options_override_the_preset(tmp_path: Path) -> None:
    save(tmp_path / "a.png", colour(255))
    assert only(tmp_path, preset="caffe", order="RGB", mean=(0.0,))["x"][0, :, 0, 0].tolist() == [255, 0, 0]
    assert not ImageOptions(preset="yolo", letterbox=False).preprocessing().letterbox
    assert not ImageOptions(preset="yolo", resize=8).preprocessing().letterbox
    assert ImageOptions(preset="0-1", mean=(0.1,)).name is None
    with pytest.raises(DataError, match="--image-letterbox keeps the whole image"):
        ImageOptions(letterbox=True, resize=8).preprocessing()


def test_grey_input_takes_the_average_of_three_values(tmp_path: Path) -> None:
    save(tmp_path / "a.png", colour(255, 255, 255))
    grey = model("float[N,1,4,6] x")
    assert only(tmp_path, grey, mean=(0.0, 0.5, 1.0))["x"].tolist() == np.full((1, 1, 4, 6), 0.5).tolist()
    with pytest.raises(DataError, match="--image-std has 2 values, but the model takes 1: give 1 or 1"):
        only(tmp_path, grey, std=(1.0, 2.0))


@pytest.mark.parametrize("name", PRESETS)
def test_formula_names_what_is_done(name: str) -> None:
    wanted = {
        "imagenet": "(x/255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)",
        "0-1": "x/255",
        "0-255": "x",
        "-1..1": "(x/255 - 0.5) / 0.5",
        "caffe": "x - (103.939, 116.779, 123.68), BGR",
        "yolo": "x/255",
    }
    assert str(PRESETS[name]) == wanted[name]


def test_letterbox_keeps_the_aspect_ratio(tmp_path: Path) -> None:
    save(tmp_path / "images" / "wide.png", colour(255, size=(20, 40)))
    save(tmp_path / "masks" / "wide.png", np.full((20, 40), 3))
    batch = only(tmp_path, model("float[N,3,8,8] x"), preset="yolo")
    assert (batch["x"][0, 0, 2:6] == 1).all()
    assert np.allclose(batch["x"][0, :, [0, 1, 6, 7]], 114 / 255)
    assert batch[LABELS][0, :, 0].tolist() == [255, 255, 3, 3, 3, 3, 255, 255]


# Class folders.


def class_folders(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / name / "a.png", colour(1))
    return folder


@pytest.mark.parametrize(
    ("folders", "classes", "labels"),
    [
        (["cat", "dog"], None, [0, 1]),
        (["10", "2", "9"], None, [10, 2, 9]),
        (["00010", "00002"], None, [2, 10]),
        (["1", "dog"], None, [0, 1]),
        (["cat"], None, None),
        (["cat", "dog"], "bird\ndog\n\ncat\n", [3, 1]),
        (["3", "cat"], "bird\ndog\ncat\nfox", [3, 2]),
        (["n01", "n02"], "n02 tench, fish\nn01 shark, fish", [1, 0]),
    ],
)
def test_labels_of_class_folders(
    tmp_path: Path, folders: list[str], classes: str | None, labels: list[int] | None
) -> None:
    data = class_folders(tmp_path / "data", *folders)
    names = None if classes is None else tmp_path / "names.txt"
    if names is not None:
        names.write_text(str(classes))
    batch = only(data, classes=names)
    assert batch.get(LABELS, np.array(None)).tolist() == labels


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (["cat", "dgo"], "cat\ndog", "folders 'dgo' are none of the 2 names of --classes"),
        (["cat", "7"], "cat\ndog", "folders '7' are none of the 2 names"),
        (["cat"], "cat\ndog\ncat", "contains 'cat' twice"),
        (["cat"], "\n\n", "is empty"),
        (["01", "1"], None, "contain one number twice"),
    ],
)
def test_class_folders_that_are_not_clear_are_refused(
    tmp_path: Path, folders: list[str], classes: str | None, message: str
) -> None:
    data = class_folders(tmp_path / "data", *folders)
    if classes is not None:
        (tmp_path / "names.txt").write_text(classes)
    with pytest.raises(DataError, match=message):
        only(data, classes=None if classes is None else tmp_path / "names.txt")


def test_file_of_classes_must_exist_and_be_used(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.png", colour(1))
    (tmp_path / "names.txt").write_text("cat")
    with pytest.raises(DataError, match="are in no class folder"):
        only(tmp_path / "data", classes=tmp_path / "names.txt")
    with pytest.raises(DataError, match="cannot read the classes"):
        only(tmp_path / "data", classes=tmp_path / "none.txt")


# Masks.


@pytest.mark.parametrize("name", ["masks", "labels", "annotations"])
@pytest.mark.parametrize("mode", [None, "P"])
def test_masks_are_labels_and_no_images(tmp_path: Path, name: str, mode: str | None) -> None:
    mask = np.arange(24).reshape(4, 6)
    for stem in ("a", "b"):
        save(tmp_path / "images" / "deep" / f"{stem}.png", colour(1))
        save(tmp_path / name / f"{stem}.png", mask, mode)
    batch = only(tmp_path)
    assert batch["x"].shape == (2, 3, 4, 6)
    assert batch[LABELS].tolist() == [mask.tolist()] * 2


def test_masks_take_the_size_of_the_output(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", colour(1, size=(8, 12)))
    save(tmp_path / "masks" / "a.png", np.repeat(np.repeat([[1, 2, 3], [4, 5, 255]], 4, 0), 4, 1))
    batch = only(tmp_path, model("float[N,3,4,6] x", "float[N,7,2,3] y"))
    assert batch[LABELS].tolist() == [[[1, 2, 3], [4, 5, 255]]]


def test_masks_beside_images(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "a.jpg", colour(1))
    save(tmp_path / "flat" / "a_mask.png", np.ones((4, 6)))
    save(tmp_path / "below" / "a.jpg", colour(1))
    save(tmp_path / "below" / "masks" / "a.png", np.ones((4, 6)))
    for name in ("flat", "below"):
        batch = only(tmp_path / name)
        assert batch["x"].shape[0] == 1
        assert batch[LABELS].tolist() == np.ones((1, 4, 6)).tolist()


def test_classes_may_be_called_masks(tmp_path: Path) -> None:
    assert only(class_folders(tmp_path, "gloves", "masks"))[LABELS].tolist() == [0, 1]


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        save(tmp_path / "images" / f"{stem}.png", colour(1))
    save(tmp_path / "masks" / "a.png", colour(1))
    with pytest.raises(DataError, match=r"1 of 2 images have no mask in masks/: b\.png"):
        only(tmp_path)
    save(tmp_path / "masks" / "b.png", colour(1))
    with pytest.raises(DataError, match=r"a\.png' has colours \(RGB\): give class ids"):
        only(tmp_path)


# Boxes.


def test_boxes_of_yolo_follow_the_letterbox(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        save(tmp_path / "images" / "val" / f"{stem}.png", colour(1, size=(20, 40)))
    (tmp_path / "labels" / "val").mkdir(parents=True)
    (tmp_path / "labels" / "val" / "a.txt").write_text(
        "2 0.5 0.5 0.5 1\n\n1 0.1 0.1 0.3 0.1 0.2 0.4\n0 0.5 0.5 0.001 1\n"
    )
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    found = open_source(tmp_path, model("float[N,3,8,8] x"), ImageOptions(preset="yolo"))
    (batch,) = found.batches(2)
    assert isinstance(found, ImageFolder)
    assert found.found.facts == ("images without a file in labels/, which count as empty: 1",)
    wanted = [[[2, 2, 6, 6, 2], [0.8, 2.4, 2.4, 3.6, 1], [-1] * 5], [[-1] * 5] * 3]
    np.testing.assert_allclose(batch[LABELS], wanted, atol=1e-6)
    squeezed = only(tmp_path, model("float[N,3,8,8] x"))[LABELS][0, 0]
    np.testing.assert_allclose(squeezed, [2, 0, 6, 8, 2], atol=1e-6)


@pytest.mark.parametrize(
    "text", ["cat 0.1 0.1 0.1 0.1", "1 0.1 0.1", "0.5 0.1 0.1 0.1 0.1", "1 20 30 10 10", "1 nan 0 0 0"]
)
def test_other_texts_are_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path / "images" / "a.png", colour(1))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(text)
    with pytest.raises(DataError, match=r"a\.txt' has no lines of class, x, y, width and height \(YOLO\)"):
        only(tmp_path)


def coco(folder: Path, **other: Any) -> Path:
    for stem in ("a", "b", "c"):
        save(folder / "images" / f"{stem}.png", colour(1, size=(20, 40)))
    content = {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 20},
            {"id": 3, "file_name": "a.png", "width": 40, "height": 20},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "bbox": [10, 0, 20, 20], "category_id": 90},
            {"image_id": 7, "bbox": [0, 0, 40, 20], "category_id": 4, "iscrowd": 1},
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances.json").write_text(json.dumps(content | other))
    (folder / "annotations" / "captions.json").write_text('{"images": [], "annotations": []}')
    return folder


def test_boxes_of_coco(tmp_path: Path) -> None:
    folder = coco(tmp_path / "data")
    batch = only(folder, model("float[N,3,8,8] x"))
    assert batch["x"].shape[0] == 2
    assert batch[LABELS].tolist() == [[[-1] * 5], [[2, 0, 6, 8, 1]]]
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    named = only(folder, model("float[N,3,8,8] x"), classes=tmp_path / "names.txt")
    assert named[LABELS][1, 0, 4] == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"annotations": [{"bbox": [1]}]}, "is not in COCO's format"),
        ({"annotations": [{"image_id": 7, "bbox": [10, 0, 20, 20], "category_id": 5}]}, r"KeyError\(5\)"),
        ({"images": [{"id": 1, "file_name": "z.png"}]}, "describe none of the 3 images"),
        ({"categories": 3}, "is not in COCO's format"),
        ({"annotations": "none"}, "none of captions.json, instances.json is a COCO file"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        only(coco(tmp_path, **other))


# Broken files.


def test_broken_images_are_skipped_on_request(tmp_path: Path) -> None:
    folder = class_folders(tmp_path, "cat", "dog", "fox")
    (folder / "cat" / "b.jpg").write_bytes(b"nonsense")
    whole = save(folder / "dog" / "b.jpg", np.random.default_rng(0).integers(0, 255, (60, 60, 3)))
    whole.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(DataError, match=r"b\.jpg' cannot be read"):
        only(folder)
    source = ImageFolder(folder, open_source_input(), ImageOptions(skip_broken=True))
    assert [path.parent.name for path, _ in source.broken] == ["cat", "dog"]
    (batch,) = source.batches(9)
    assert batch[LABELS].tolist() == [0, 1, 2]
    for name in ("cat", "dog", "fox"):
        (folder / name / "a.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="none of the 5 images can be read"):
        ImageFolder(folder, open_source_input(), ImageOptions(skip_broken=True))


def open_source_input() -> Any:
    from cpd_onnx.data.signature import inputs_of

    return inputs_of(IMAGES)[0]
