"""Recipes repeat a run, and say what is wrong with them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from cpd_onnx.cli.main import main
from tests.support.digits import MODELS, small_digits
from tests.support.runs import plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arrays = dict(np.load(MODELS / "digits_train.npz"))
    np.savez(tmp_path / "few.npz", **{k: v[:96] for k, v in arrays.items()})
    onnx.save(small_digits(), tmp_path / "digits.onnx")
    return tmp_path


def compress(folder: Path, name: str, *options: object) -> int:
    return main(plain([*map(str, ["compress", folder / "digits.onnx", "-o", folder / name, "--no-report", *options])]))


def test_a_recipe_repeats_a_run(folder: Path) -> None:
    said = ["--target", "params=0.7", "--rounds", 2, "--steps", 4, "--batch-size", 32, "--lr", 0.01, "--threads", 1]
    more = ["--shift", 1, "--keep", "head*", "--loss", "scores=mse", "--image-mean", "0.5,0.4,0.3"]
    assert compress(folder, "a.onnx", "--data", folder / "few.npz", *said, *more) == 0
    recipe = folder / "a.onnx.recipe.toml"
    content = tomllib.loads(recipe.read_text())
    assert content["target"] == "params=0.7"
    assert content["keep"] == ["head*"]
    assert content["image-mean"] == "0.5,0.4,0.3"
    assert compress(folder, "b.onnx", "--recipe", recipe) == 0
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    assert recipe.read_text() == (folder / "b.onnx.recipe.toml").read_text()
    assert compress(folder, "c.onnx", "--recipe", recipe, "--target", "params=0.6") == 0
    assert (folder / "c.onnx").read_bytes() != (folder / "a.onnx").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "no option 'learning_rate'"),
        ("lr = -1", "is not a number greater than 0"),
        ("lr = [1, 2]", "must be a single value"),
        ("flip = 1", "must be true or false"),
        ('batch-norm = "often"', "must be one of auto, frozen"),
        ("keep = 'a'", "must be a list"),
        ("lr = ", "is not a TOML file"),
    ],
)
def test_what_is_wrong_with_a_recipe(folder: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "r.toml").write_text(text)
    assert compress(folder, "a.onnx", "--data", folder / "few.npz", "--recipe", folder / "r.toml") == 1
    assert message in capsys.readouterr().err
    assert not (folder / "a.onnx").exists()


def test_training_needs_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress(folder, "a.onnx", "--distill") == 1
    assert "training needs samples: give --data" in capsys.readouterr().err
    line = [
        "compress",
        str(folder / "digits.onnx"),
        "-o",
        str(folder / "a.onnx"),
        "--target",
        "macs=0.5",
        "--no-check-speed",
        "--repair",
    ]
    assert main(line) == 1
    assert "repair needs samples: give --data" in capsys.readouterr().err
    assert compress(folder, "a.onnx", "--recipe", folder / "none.toml") == 1
    assert "cannot read recipe" in capsys.readouterr().err
