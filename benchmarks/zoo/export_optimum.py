"""Export small random models of transformers with optimum, one to three files each.

Environment: pip install torch==2.13.0 optimum-onnx onnxruntime

    python export_optimum.py --out DIR [--only REGEX] [--exporter optimum|optimum-cache]

`optimum` are models without caches: texts, images, sounds, time series. `optimum-cache` are models that generate, with
their caches as inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import common
import tiny
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.tasks import TasksManager

PREFERRED = ("text-classification", "image-classification", "object-detection", "audio-classification",
             "semantic-segmentation", "image-segmentation", "depth-estimation", "image-to-image", "keypoint-detection",
             "automatic-speech-recognition", "time-series-forecasting", "text-to-audio", "masked-im",
             "zero-shot-image-classification", "zero-shot-object-detection", "text-generation", "text2text-generation",
             "feature-extraction")  # fmt: skip
"""Tasks in order of preference; a type is exported for the first that it has, and as an encoder."""
COMPOSED = ("vision-encoder-decoder", "encoder-decoder", "speech-encoder-decoder", "colpali", "internlm2", "trocr",
            "mctct")  # fmt: skip
"""Types whose parts are not set by the configuration alone, or whose code lies elsewhere."""

WAVES = ("hubert", "data2vec-audio", "wav2vec2", "wav2vec2-conformer", "sew", "sew-d", "unispeech", "unispeech-sat", "wavlm",
         "moonshine")  # fmt: skip
"""Types that read waves, whose length is named like that of a text."""
DIMS = {"batch_size": 2, "num_channels": 3, "height": 64, "width": 64}


def export(kind: str, task: str, folder: Path) -> None:
    """Build and export one model for a task."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    make = TasksManager.get_model_class_for_task(task.removesuffix("-with-past"), framework="pt", model_type=kind)
    config = tiny.config_of(kind)
    model = make._from_config(config) if hasattr(make, "_from_config") else make.from_config(config)
    onnx_export_from_model(tiny.perturbed(model), folder, task=task, do_validation=False)


def jobs(exporter: str) -> Iterator[common.Job]:
    """List the types, each with one or two tasks."""
    for kind, by_format in TasksManager._SUPPORTED_MODEL_TYPE.items():
        tasks = list(by_format.get("onnx", {}))
        if not tasks or kind in COMPOSED:
            continue
        with_past = [t for t in reversed(tasks) if t.endswith("-with-past")]
        plain = [t for t in PREFERRED if t in tasks]
        chosen = with_past[:1] if exporter == "optimum-cache" else [*plain[:1], *(plain[-1:] if not with_past else [])]
        for task in dict.fromkeys(chosen):
            dims = DIMS | ({"sequence_length": 2000} if kind in WAVES else {})
            yield common.Job(name=f"{kind}.{task}", family=kind, build=partial(export, kind, task), dims=dims)


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__, exporter=["optimum", "optimum-cache"])
    for exporter in [args.exporter] if args.exporter else ("optimum", "optimum-cache"):
        common.run(jobs(exporter), args, exporter=exporter, version=version("optimum-onnx"), parts=True)


if __name__ == "__main__":
    main()
