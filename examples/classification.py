"""Compress a classifier: the embedded one for handwritten digits, or your own.

    python examples/classification.py
    python examples/classification.py MODEL.onnx TRAIN.npz TEST.npz

The arrays of the .npz files are named after the model's inputs. Only the test data need `labels`, for the score.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import onnx
from shared import Task, arguments, compare

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import LABELS, ArraySource, read_npz


def main() -> None:
    """Read the files, compress the model and print the comparison."""
    given = arguments(__doc__, "model", "train", "test")
    with resources.as_file(resources.files("cpd_onnx.models")) as folder:
        model = onnx.load(given.model or folder / "digits.onnx")
        train, test = (
            read_npz(path or Path(folder) / f"digits_{part}.npz")
            for part, path in (("train", given.train), ("test", given.test))
        )
    unlabelled = {name: array for name, array in train.items() if name != LABELS}
    task = Task(
        "Classification",
        "top-1",
        judge=lambda proto: evaluate(proto, ArraySource(test), "top1"),
        data=unlabelled,
        recipe={"steps": 5 if given.quick else 100, "lr": 3e-3, "batch_size": 64},
        macs=0.2,
        samples=64 if given.quick else 512,
    )
    compare(model, task, given.out)


if __name__ == "__main__":
    main()
