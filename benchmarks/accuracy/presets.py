"""Does the preflight recommend the preprocessing that a model was trained with? Run on trained models and real images.

    python benchmarks/accuracy/presets.py MODELS --images gtsrb=FOLDER --images cifar10=FOLDER --images camvid=FOLDER

MODELS is the folder of the .onnx files named in CASES; those that are missing are skipped. Each --images names a folder of
images, of which the class folders (numbers, or the names in --classes NAME=FILE) are labels. Without labels, each model is
judged by its own answers; "right" is then the share of right answers under that preset, where there are labels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from cpd_onnx.data import ranking
from cpd_onnx.data.images.options import ImageOptions, Preprocessing
from cpd_onnx.data.metrics import run
from cpd_onnx.data.sources import ImageFolder, open_source
from cpd_onnx.data.survey import chosen
from cpd_onnx.ir.model import load
from cpd_onnx.runtime.sessions import open_model

RESULT = Path(__file__).parents[1] / "results" / "presets.json"
IMAGENET, NONE = "--preset imagenet", "none fits"
CASES = (
    # model, images, number of images, the preset it was trained with (or the nearest one)
    ("resnet20_gtsrb", "gtsrb", 128, IMAGENET),
    ("resnet56_jpeg_cifar10", "cifar10", 128, IMAGENET),
    ("resnet20_jpeg_cifar10", "cifar10", 128, IMAGENET),
    ("resnet56_vainf_groupsl_dense_cifar10", "cifar10", 128, IMAGENET),
    ("vit_cifar10_smmk47", "cifar10", 128, IMAGENET),
    ("espnet_p2_q8_camvid", "camvid", 12, NONE),
    ("enet_davidtvs_default_camvid", "camvid", 12, "--preset 0-1"),
    ("espnetv2_s0.5_city", "camvid", 12, IMAGENET),
    ("dicenet_s0.75_city", "camvid", 12, IMAGENET),
    ("twinlitenet", "camvid", 12, "--preset 0-1"),
    ("road_segmentation_adas_0001", "camvid", 12, "--preset 0-255 --image-order BGR"),
    ("yolox_nano", "camvid", 12, "--preset 0-255 --image-order BGR"),
    ("efficientnet_lite0", "imagenet", 128, "--preset -1..1"),
)


def ranked(path: Path, folder: Path, count: int, *, with_labels: bool) -> ranking.Ranking | None:
    model = load(path)
    session = open_model(model)
    source = open_source(folder, model.proto, ImageOptions())
    assert isinstance(source, ImageFolder)
    rows = chosen(source.count, count)
    pixels = np.stack([source.decoder.pixels(source.files[row])[0] for row in rows])
    labels = source.labels(rows, []) if with_labels and not source.found.boxes else None
    size = session.get_inputs()[0].shape[0]
    batch = size if isinstance(size, int) else 16

    def outputs(preprocessing: Preprocessing) -> list[Any]:
        made = [
            run(session, {source.entry.name: source.decoder.prepared(pixels[start : start + batch], preprocessing)})
            for start in range(0, len(pixels), batch)
        ]
        return [np.concatenate(parts) for parts in zip(*made, strict=True)]

    return ranking.rank(outputs, source.decoder.preprocessing, source.layout[:2], source.layout[2], labels)


def most_confident(found: ranking.Ranking) -> str:
    return max(found.of, key=lambda name: found.of[name].confidence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--images", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", help="part of a model's name")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    folders = dict(entry.split("=", 1) for entry in options.images)
    elsewhere = dict(entry.split("=", 1) for entry in options.model)
    rows = []
    for name, images, count, wanted in CASES:
        path = Path(elsewhere.get(name, options.models / f"{name}.onnx"))
        if not path.is_file() or images not in folders or (options.only and options.only not in name):
            continue
        started = time.perf_counter()
        found = ranked(path, Path(folders[images]), count, with_labels=False)
        assert found is not None
        seconds = time.perf_counter() - started
        labelled = ranked(path, Path(folders[images]), count, with_labels=True)
        best = found.best or NONE
        rows.append(
            {
                "model": name, "images": f"{count} of {images}", "trained with": wanted, "picked": best,
                "is_right": best == wanted, "by confidence alone": most_confident(found), "warning": found.warning(),
                "with labels": labelled.best if labelled else None, "seconds": round(seconds, 1),
                "presets": ranking.as_table(labelled or found),
            }
        )  # fmt: skip  # a table
        mark = "right" if best == wanted else "WRONG"
        print(
            f"{name:38s} {mark}  picked {best}; trained with {wanted}; by confidence alone {most_confident(found)}",
            flush=True,
        )
    right = sum(row["is_right"] for row in rows)
    confident = sum(row["by confidence alone"] == row["trained with"] for row in rows)
    print(f"{right} of {len(rows)} right; by confidence alone {confident}")
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
