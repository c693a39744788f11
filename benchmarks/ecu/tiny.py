"""The four networks of MLPerf Tiny with public weights, pruned and taken to a Cortex-M4F.

    python benchmarks/ecu/tiny.py --models FOLDER --data-folder DATA [--only MODEL]
    python benchmarks/ecu/tiny.py --table

FOLDER has the files of `export_tiny.py`, DATA a folder with `load.py`, CIFAR-10 and ImageNet. The networks are those of the
benchmark (Banbury et al., MLPerf Tiny Benchmark, NeurIPS 2021), the table is that of `binary.py`.

* image_classification (ResNet-8): `compress` prunes and distills on 10,000 training images of CIFAR-10 without labels; the
  score is the accuracy on all test images.
* visual_wake_words (MobileNetV1, a quarter of the width): `compress` on 500 photographs of ImageNet, which are not those
  that it was trained on; the score is how often the answer is the original's on 1,000 others.
* keyword_spotting (a depthwise separable network) and anomaly_detection (an autoencoder of linear layers): the sounds that
  they were trained on are not at hand, so that inputs are generated, and no score is given: what is shown is the program.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from binary import ROOT, SEED, Task, answers, loaded, recorded, show
from emulated import missing
from PIL import Image

from cpd_onnx.data.sources import calibration
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.ir.model import Array, load
from cpd_onnx.shapes.inference import fold

RESULT = ROOT / "benchmarks" / "results" / "tiny.json"
GIVEN, GENERATED = 10_000, 256
"""Number of training images that `compress` gets, without labels, and of inputs that are generated."""
SIDE = 96
"""Height and width of the images of visual wake words."""


def tasks(models: Path, folder: Path) -> Iterator[Task]:
    """Yield the networks with their samples."""
    module: Any = loaded(folder / "load.py")
    (given, _), (tested, labels) = module.cifar10("train"), module.cifar10("test")
    distilled = ("compress", "--epochs", "5")
    place = models / "image_classification.onnx"
    yield Task("image_classification", place, signed(given[:GIVEN]), signed(tested), labels, distilled)
    given, tested = (resized(module.imagenet(split)[0]).astype(np.float32) for split in ("calibration", "test"))
    place = models / "visual_wake_words.onnx"
    wanted = np.concatenate(answers(load(place), tested)).argmax(-1)
    yield Task("visual_wake_words", place, given, tested, wanted, ("compress",))
    for name in ("keyword_spotting", "anomaly_detection"):
        place = models / f"{name}.onnx"
        samples = generated(place)
        yield Task(name, place, samples[GENERATED // 2 :], samples[: GENERATED // 2], None)


def signed(images: Array) -> Array:
    """Return images [N, H, W, C] as image_classification takes them: from -1 to 1."""
    return (images.astype(np.float32) - 128) / 128


def resized(images: Array) -> Array:
    """Return images [N, H, W, C] in the size of visual wake words."""
    return np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in images])


def generated(path: Path) -> Array:
    """Return generated inputs of a model with one input [N, ...]."""
    model = load(path)
    source = Synthetic(fold(model), GENERATED)
    return np.concatenate([next(iter(feed.values())) for feed in calibration(model, source, GENERATED, seed=SEED)])


def main() -> None:
    """Measure and print, or print the stored results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--only", action="append", help="name of a network")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.table:
        show(json.loads(options.out.read_text()))
        return
    if options.models is None or options.data_folder is None:
        parser.error("give --models and --data-folder")
    if missing():
        sys.exit(f"not installed: {', '.join(missing())}")
    show(recorded(tasks(options.models, options.data_folder), options.only, options.out))


if __name__ == "__main__":
    main()
