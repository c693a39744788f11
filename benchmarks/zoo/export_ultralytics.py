"""Export random YOLO models of ultralytics with its own export.

Environment: pip install torch==2.14.1 torchvision==0.29.1 ultralytics onnx onnxruntime onnxslim

    python export_ultralytics.py --out DIR [--only REGEX]
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ["YOLO_OFFLINE"] = "1"

import common
import torch
import ultralytics
from perturb import perturb
from ultralytics import RTDETR, YOLO

_NAMES = (
    "yolo11n yolo11n-cls yolo11n-obb yolo11n-pose yolo11n-seg yolo12n yolo12n-cls yolo12n-obb yolo12n-pose yolo12n-seg "
    "yolo26n yolo26n-cls yolo26n-obb yolo26n-p2 yolo26n-p6 yolo26n-pose yolo26n-seg yolo26n-sem yolo26n-depth yolov10n "
    "yolov3-tiny yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-cls yolov8n-ghost yolov8n-ghost-p2 yolov8n-obb yolov8n-p2 "
    "yolov8n-p6 yolov8n-pose yolov8n-pose-p6 yolov8n-seg yolov8n-seg-p6 yolov8n-world yolov8n-worldv2 yolov9t yolov9s "
    "yolov8n-rtdetr"
)
ARCHITECTURES = _NAMES.split()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"simplify": False},
    "simplify": {},
    "dynamic": {"dynamic": True},
    "half": {"quantize": 16},
    "nms": {"nms": True},
    "opset13": {"opset": 13, "simplify": False},
}
OFTEN = ("yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-obb", "yolov8n-cls", "yolo11n", "yolo11n-seg", "yolo26n",
         "yolov5n", "yolov10n")  # fmt: skip
"""Architectures that are exported with all options; the others are with two."""


def export(architecture: str, options: dict[str, Any], path: Path) -> None:
    """Build, perturb and export one model at 96 x 96."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = (RTDETR if "rtdetr" in architecture else YOLO)(f"{architecture}.yaml")
    perturb(model.model, [torch.rand(2, 3, 96, 96)])
    path = path.absolute()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, contextlib.chdir(folder):
        os.replace(model.export(format="onnx", imgsz=96, device="cpu", **options), path)


def jobs() -> Iterator[common.Job]:
    """List the architectures with their options."""
    for number, architecture in enumerate(ARCHITECTURES):
        names = list(OPTIONS) if architecture in OFTEN else [list(OPTIONS)[number % 4], list(OPTIONS)[(number + 2) % 4]]
        for name in names:
            dims = {"batch": 2, "height": 96, "width": 96}
            build = partial(export, architecture, OPTIONS[name])
            yield common.Job(f"{architecture}.{name}", architecture.partition("-")[0], build, dims=dims)


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__)
    common.run(jobs(), args, exporter="ultralytics", version=ultralytics.__version__)


if __name__ == "__main__":
    main()
