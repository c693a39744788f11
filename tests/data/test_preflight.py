"""The check before a run: what it finds in samples, and what it refuses."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from cpd_onnx.cli.main import main
from cpd_onnx.data import preflight as preflights
from cpd_onnx.data import ranking
from cpd_onnx.data.images.options import PRESETS, ImageOptions, Preprocessing
from cpd_onnx.data.open import source_of
from cpd_onnx.data.preflight import Preflight, preflight
from cpd_onnx.data.sources import LABELS, ArraySource, FunctionSource, inputs_of, open_source
from cpd_onnx.data.survey import chosen
from cpd_onnx.errors import DataError
from cpd_onnx.ir.model import Model, load
from tests.support.runs import plain

Array = npt.NDArray[Any]
image_module = pytest.importorskip("PIL.Image")
SIZE = (4, 4)


def classifier(classes: int = 3, gain: float = 40.0, planes: bool = False) -> Model:
    """A model that tells which channel is above its mean over ImageNet, for images prepared as for ImageNet."""
    text = (
        "g (float[N,3,4,4] x) => (float[N,C] y) { m = ReduceMean<axes = [2, 3], keepdims = 0>(x) y = MatMul(m, w) }"
        if not planes
        else "g (float[N,3,4,4] x) => (float[N,C,4,4] y) { y = Conv(x, w) }"
    )
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    weight = np.zeros((3, classes), np.float32)
    weight[:, :3] = np.eye(3) * gain
    if planes:
        weight = weight.T[..., None, None]
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return load(proto)


def pictures(count: int, seed: int = 0) -> tuple[Array, Array]:
    """Images of which one channel is a little brighter than usual, and the other two darker; and which one it is."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    usual = np.array(PRESETS["imagenet"].mean) * 255
    images = np.broadcast_to(usual, (count, *SIZE, 3)) - 6 + rng.uniform(-4, 4, (count, *SIZE, 3))
    images[np.arange(count), :, :, labels] += 12
    return images.astype(np.uint8), labels


def written(folder: Path, images: Array, labels: Array | None = None) -> Path:
    for place, image in enumerate(images):
        inner = folder if labels is None else folder / f"{labels[place]}"
        inner.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(image).save(inner / f"{place:03d}.png")
    return folder


def checked(data: Any, model: Model, metric: str | None = None, **options: Any) -> Preflight:
    return preflight(source_of(data, model, images=ImageOptions(**options)), model, metric=metric)


# What is found.


def test_one_line_says_what_is_fed(tmp_path: Path) -> None:
    folder = written(tmp_path, pictures(6)[0])
    found = checked(folder, classifier(), preset="imagenet")
    assert found.preprocessing == (
        "6 PNG 4x4 RGB -> float32 [3,4,4], (x/255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)"
    )
    assert found.as_json() == {
        "samples": 6, "source": "folder of images", "facts": [], "preprocessing": found.preprocessing,
        "preset": "imagenet", "warnings": [],
    }  # fmt: skip
    assert found.lines() == [found.preprocessing]


def test_mixed_images_copies_and_plain_ones_are_named(tmp_path: Path) -> None:
    images, _ = pictures(4)
    folder = written(tmp_path, images)
    image_module.fromarray(images[0]).save(folder / "copy.png")
    image_module.fromarray(np.full((8, 16), 9, np.uint8)).save(folder / "plain.bmp")
    (folder / "broken.png").write_bytes(b"nonsense")
    found = checked(folder, classifier(), preset="imagenet", skip_broken=True)
    assert found.preprocessing is not None
    assert found.preprocessing.startswith("6 images (PNG 5, BMP 1) 4x4 to 16x8 (RGB 5, L 1) -> float32 [3,4,4]")
    assert "left out because they cannot be read (1): broken.png" in found.facts
    assert any("which changes their aspect ratio" in fact for fact in found.facts)
    assert found.warnings == (
        "copies of other images: 1 of 6, such as copy.png of 000.png",
        "images of one colour: 1 of 6, plain.bmp",
    )


def test_broken_image_is_an_error_without_the_option(tmp_path: Path) -> None:
    folder = written(tmp_path, pictures(4)[0])
    (folder / "002.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"002\.png' cannot be read"):
        checked(folder, classifier())


def test_arrays_are_described() -> None:
    x = np.zeros((5, 3, 4, 4), np.float32)
    x[:2] = np.linspace(-1, 1, 48).reshape(3, 4, 4)
    found = preflight(ArraySource({"x": x}), classifier())
    assert found.facts == ("array 'x' is float32 from -1 to 1, mean 0",)
    assert found.warnings == ("constant samples of 'x': 3 of 5", "copies of other samples: 3 of 5")
    x[0, 0, 0, 0] = np.nan
    assert preflight(ArraySource({"x": x}), classifier()).warnings[0] == "array 'x' contains values that are not finite"


def test_other_sources_are_not_read_through() -> None:
    model = classifier()
    feeds = FunctionSource(lambda: iter([{"x": np.zeros((2, 3, 4, 4), np.float32)}]), inputs_of(model.proto))
    assert preflight(feeds, model).lines() == ["samples (function)"]
    assert preflight(source_of("synthetic", model), model).source == "synthetic"


def test_few_of_many_samples_are_drawn_alike() -> None:
    assert chosen(5, 9) == [0, 1, 2, 3, 4]
    assert chosen(1000, 9) == chosen(1000, 9)
    assert len(set(chosen(1000, 9))) == 9


# Preprocessing.


@pytest.mark.parametrize("planes", [False, True])
def test_another_preset_is_recommended(tmp_path: Path, planes: bool) -> None:
    folder, model = written(tmp_path, pictures(48)[0]), classifier(planes=planes)
    (warning,) = checked(folder, model).warnings
    assert warning.startswith("the original fits --preset imagenet better (confidence ")
    assert warning.endswith("classes)")
    assert checked(folder, model, preset="imagenet").warnings == ()


def test_labels_decide_where_there_are_any(tmp_path: Path) -> None:
    images, labels = pictures(48)
    folder = written(tmp_path, images, labels)
    (warning,) = checked(folder, classifier()).warnings
    assert "the original is right more often with --preset imagenet (100.0%) than with --preset 0-1" in warning


@pytest.mark.parametrize("factor", [1.0, 255.0])
def test_arrays_of_pixels_are_compared_too(factor: float) -> None:
    images = pictures(48)[0].transpose(0, 3, 1, 2).astype(np.float32) / 255 * factor
    found = preflight(ArraySource({"x": images}), classifier())
    assert any("fits --preset imagenet better" in warning for warning in found.warnings)


def test_a_machine_that_gets_slower_meanwhile_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    # the number of images was reduced in a later run than the first, whose answers are compared with that one's
    images = pictures(48)[0].transpose(0, 3, 1, 2).astype(np.float32) / 255
    calls = itertools.count()
    monkeypatch.setattr(preflights.time, "perf_counter", lambda: 0.0 if next(calls) < 8 else 10.0 * next(calls))
    found = preflight(ArraySource({"x": images}), classifier())
    assert any("fits --preset imagenet better" in warning for warning in found.warnings)


def test_saturated_answers_are_said_to_fit_no_preset() -> None:
    images = pictures(24)[0].transpose(0, 3, 1, 2).astype(np.float32) / 255
    (warning,) = preflight(ArraySource({"x": images}), classifier(gain=5000)).warnings
    assert warning.startswith("the original's answers are saturated with every preset (with --preset 0-1")


def of_outputs(*outputs: Array, size: tuple[int, int] = (32, 32)) -> ranking.Ranking | None:
    """A ranking whose presets give these outputs in turn, of which the last one is repeated."""
    left = list(outputs)
    return ranking.rank(lambda _: [left.pop(0) if len(left) > 1 else left[0]], Preprocessing(), size, 1)


def test_confidence_in_one_class_does_not_win() -> None:
    rng = np.random.default_rng(0)
    sure_of_one = np.zeros((60, 10), np.float32)
    sure_of_one[:, 3] = 14
    varied = 6 * np.eye(10, dtype=np.float32)[rng.integers(0, 10, 60)]
    found = of_outputs(sure_of_one, varied, sure_of_one)
    assert found is not None
    assert found.best == "--preset imagenet"
    assert found.of["--preset 0-1"].confidence > found.of["--preset imagenet"].confidence
    same = of_outputs(varied)
    assert same is not None
    assert same.warning() is None


@pytest.mark.parametrize(
    "output",
    [
        np.zeros((8, 5), np.int64),
        np.zeros((8, 1), np.float32),
        np.zeros((8, 1, 32, 32), np.float32),
        np.full((8, 5), np.nan, np.float32),
        np.ones((8, 5, 7), np.float32),
    ],
)
def test_outputs_without_classes_say_nothing(output: Array) -> None:
    assert of_outputs(output) is None


def test_features_say_nothing() -> None:
    features = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32) * 0.1
    found = of_outputs(features)
    assert found is not None
    assert found.best is None
    assert found.warning() is None


def test_probabilities_say_more_than_coordinates_before_them() -> None:
    rng = np.random.default_rng(0)
    boxes = 4 * rng.normal(size=(64, 4)).astype(np.float32)
    faces = np.eye(2, dtype=np.float32)[rng.integers(0, 2, 64)] * 0.8 + 0.1
    found = ranking.behaviour_of([boxes, faces], (32, 32))
    assert found is not None
    assert found.confidence == pytest.approx(0.9)
    scores = ranking.class_scores([boxes, boxes[:, :3]])
    assert scores is not None
    assert scores.shape == (64, 4)


@pytest.mark.parametrize(("ones", "is_said"), [(6, False), (48, True)])
def test_classes_that_are_only_more_balanced_are_no_reason(ones: int, is_said: bool) -> None:
    def of_two(count: int, sure: float) -> Array:
        made = np.tile(np.float32([0, sure]), (96, 1))
        made[:count] = made[:count, ::-1]
        return made

    upright = of_two(2, 4.0)
    found = of_outputs(upright, of_two(ones, 3.8), upright)
    assert found is not None
    assert found.best == "--preset imagenet"
    assert (found.warning() is not None) == is_said


def test_objects_are_counted() -> None:
    head = np.zeros((16, 16 + 4 + 1, 8), np.float32)
    found_some = head.copy()
    found_some[:, ::7, 4:6] = 0.9
    found = of_outputs(head, found_some, head)
    assert found is not None
    assert found.warning() == (
        "the original finds more objects with --preset imagenet (3.0 an image) than with --preset 0-1 (0.0)"
    )


def objects(count: float) -> ranking.Behaviour:
    return ranking.Behaviour("objects", count, 2, 0.0, None, np.full((16, 1), 0.6 * count), np.zeros(16))


def test_boxes_everywhere_are_no_objects() -> None:
    few, flood = objects(0.4), objects(243)
    assert ranking.Ranking("--preset 0-1", {"--preset 0-1": few, "--preset caffe": flood}).warning() is None
    swapped = ranking.Ranking("--preset caffe", {"--preset 0-1": few, "--preset caffe": flood}).warning()
    assert swapped == (
        "the original finds 243 objects an image with --preset caffe, too many to be right, and 0.4 with --preset 0-1"
    )
    lost = ranking.Ranking("--preset caffe", {"--preset 0-1": objects(200), "--preset caffe": flood}).warning()
    assert lost == (
        "the original finds 243 objects an image with --preset caffe, and too many with every preset: "
        "give its preprocessing with --image-mean, --image-std and --image-scale"
    )


# Labels.


@pytest.mark.parametrize(
    ("first", "body", "is_said"),
    [
        ("N", "m = ReduceMean<axes = [0]>(x) y = Sub(x, m)", True),
        ("4", "m = ReduceMean<axes = [0]>(x) y = Sub(x, m)", False),  # that is its batch
        ("N", "m = ReduceMean<axes = [1]>(x) y = Sub(x, m)", False),
        ("N", "m = RandomNormalLike(x) y = Add(x, m)", False),  # no answer is like another
    ],
)
def test_samples_that_depend_on_each_other_are_told(first: str, body: str, is_said: bool) -> None:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[{first},3,h] x) => (float[{first},3,h] y) {{ {body} }}'
    model = load(onnx.parser.parse_model(text))
    source = open_source(ArraySource({"x": np.random.default_rng(0).standard_normal((12, 3, 5), np.float32)}), model)
    said = preflight(source, model).warnings
    assert (
        any("depend on the other samples" in each and "deploy MODEL -o FILE --batch 1" in each for each in said)
        == is_said
    )


def test_labels_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, pictures(6)[0], np.arange(6))
    with pytest.raises(DataError, match=r"folder '5' is class 5, but the model has only 3 classes \(from 0\): number"):
        checked(folder, classifier(), "top1")
    assert checked(folder, classifier()).samples == 6


def test_original_near_chance_is_a_warning(tmp_path: Path) -> None:
    images, labels = pictures(60)
    right, wrong = written(tmp_path / "a", images, labels), written(tmp_path / "b", images, (labels + 1) % 3)
    assert checked(right, classifier(), "top1", preset="imagenet").warnings == ()
    warnings = checked(wrong, classifier(), "top1", preset="imagenet").warnings
    assert warnings == (
        "the original itself scores 0.0% top1 on 60 samples, chance is 33.3%: the preprocessing or the labels do not fit",
    )


def test_folders_by_the_alphabet_are_doubted_if_they_are_too_few(tmp_path: Path) -> None:
    images, labels = pictures(30)
    folder = written(tmp_path, images, np.array(["blue", "green", "red"])[labels])
    found = checked(folder, classifier(9), "top1", preset="imagenet")
    assert "labels are 3 class folders by alphabet: 0 blue, 1 green, 2 red" in found.facts
    assert found.warnings[0].startswith("3 folders are numbered by the alphabet, but the model has 9 classes")


def test_masks_of_black_and_white_are_doubted(tmp_path: Path) -> None:
    images, _ = pictures(6)
    written(tmp_path / "images", images)
    written(tmp_path / "masks", np.repeat(np.repeat([[[0, 255], [255, 0]]], 2, 1), 2, 2).repeat(6, 0).astype(np.uint8))
    found = checked(tmp_path, classifier(planes=True), "miou", preset="imagenet")
    assert any(text.startswith("masks have the values 0 and 255 only, and 255 is ignored") for text in found.warnings)


def test_samples_of_eval_follow_those_of_data() -> None:
    first, second = Preflight(3, "arrays", facts=("a",)), Preflight(4, "arrays", "4 PNG", None, ("b",), ("c",))
    both = first.followed_by(second, "--eval")
    assert both.lines() == ["3 samples (arrays)", "a", "--eval: 4 PNG", "--eval: b", "warning: --eval: c"]


def test_ranking_is_of_the_samples_that_are_opened(tmp_path: Path) -> None:
    images, labels = pictures(30)
    np.savez(tmp_path / "a.npz", x=images.transpose(0, 3, 1, 2).astype(np.float32), **{LABELS: labels})
    model = classifier()
    found = preflight(open_source(tmp_path / "a.npz", model.proto), model)
    assert any("right more often with --preset imagenet" in warning for warning in found.warnings)


# On the command line.


def trainable(folder: Path) -> Path:
    """A model with channels to prune, which tells which channel is above its mean over ImageNet."""
    text = "g (float[N,3,4,4] x) => (float[N,3] y) { h = Conv(x, a) r = Relu(h) m = ReduceMean<axes = [2, 3], keepdims = 0>(r) y = MatMul(m, b) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    first = np.concatenate([np.eye(3), -np.eye(3)])[..., None, None].astype(np.float32)
    second = np.concatenate([40 * np.eye(3), -40 * np.eye(3)]).astype(np.float32)
    proto.graph.initializer.extend([numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")])
    onnx.save(proto, folder / "m.onnx")
    return folder / "m.onnx"


def test_command_says_first_what_is_fed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = pictures(48)
    folder, path = written(tmp_path / "data", images, labels), trainable(tmp_path)
    given = [
        "prune",
        str(path),
        "--data",
        str(folder),
        "--target",
        "channels=0.7",
        "--no-verify",
        "--no-repair",
        "--score",
        "l2",
    ]
    assert main(plain([*given, "-o", str(tmp_path / "a.onnx"), "--json", str(tmp_path / "a.json")])) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "48 PNG 4x4 RGB -> float32 [3,4,4], x/255"
    assert said[-1].startswith("warning: the original is right more often with --preset imagenet (100.0%)")
    content = json.loads((tmp_path / "a.json").read_text())["preflight"]
    assert content["preset"] == "0-1"
    assert content["warnings"] == [said[-1].removeprefix("warning: ")]
    assert main(plain([*given, "-o", str(tmp_path / "b.onnx"), "--preset", "imagenet"])) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(plain([*given, "-o", str(tmp_path / "c.onnx"), "--log-level", "quiet"])) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "distill", "deploy"])
def test_all_commands_that_compute_with_samples_look_at_them(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = pictures(48)
    folder, path = written(tmp_path / "data", images, labels), trainable(tmp_path)
    made = tmp_path / ("folder" if command == "sweep" else "made.onnx")
    line = {
        "sweep": [
            path,
            "--targets",
            "channels=0.7",
            "--max-loss",
            "inf",
            "--no-check-speed",
            "--no-distill",
            "--score",
            "l2",
            "--executor",
            f"{__name__}:threads",
        ],
        "distill": [path, path, "--steps", 1, "--batch-size", 2, "--threads", 1],
        "deploy": [path, "--int8", "--samples", 4],
    }[command]
    words = [*map(str, line), "--data", str(folder), "-o", str(made), "--json", str(tmp_path / "a.json")]
    assert main(plain([command, *words])) == 0
    said = capsys.readouterr().err.splitlines()
    assert said.count("48 PNG 4x4 RGB -> float32 [3,4,4], x/255") == 1
    (warning,) = [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]
    content = json.loads((tmp_path / "a.json").read_text())["preflight"]
    assert (content["samples"], content["warnings"]) == (48, [warning])
    assert main(plain([command, *words, "--force", "--log-level", "quiet"])) == 0
    assert "warning" not in capsys.readouterr().err


def threads() -> Executor:
    """Run in this process, where nothing has to be imported again."""
    return ThreadPoolExecutor(1)


def test_values_that_begin_with_a_minus_are_no_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = written(tmp_path / "data", pictures(4)[0]), trainable(tmp_path)
    given = ["prune", str(path), "--data", str(folder), "-o", str(tmp_path / "a.onnx"), "--no-verify", "--no-repair"]
    assert main(plain([*given, "--score", "l2", "--preset", "-1..1"])) == 0
    assert "(x/255 - 0.5) / 0.5" in capsys.readouterr().err
    assert main(plain([*given, "--score", "l2", "--force", "--image-mean", "-0.5,-1,.5"])) == 0
    assert "x/255 - (-0.5, -1, 0.5)" in capsys.readouterr().err


def test_eval_is_opened_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = pictures(12)
    path, data = trainable(tmp_path), written(tmp_path / "data", images)
    beyond = written(tmp_path / "eval", images, labels + 1)
    for given, message in {
        "missing": "is not data",
        str(beyond): "folder '3' is class 3, but the model has only",
    }.items():
        assert main(["compress", str(path), "--data", str(data), "--eval", given, "-o", str(tmp_path / "a.onnx")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "a.onnx").exists()
