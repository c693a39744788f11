"""Export the smallest timm models of each architecture with timm's own export.

Environment: pip install torch==2.14.1 torchvision==0.29.1 timm onnx onnxruntime onnxscript

    python export_timm.py --out DIR [--only REGEX] [--exporter timm|timm-dynamo]

`timm` is by TorchScript, with free sizes of images where the model allows it; `timm-dynamo` by torch.export.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import common
import timm
import torch
from perturb import perturb
from timm.models import _registry as registry
from timm.utils.onnx import onnx_export

LARGEST = 9e6
"""Parameters of the largest model that is exported."""
EACH = 3
"""Models of each architecture."""
_LARGE = ("large", "huge", "giant", "base", "gigantic", "448", "384", "512", "101", "152", "200", "269")


def smallest() -> Iterator[tuple[str, str]]:
    """Yield the name and the architecture of the smallest models of each module of timm."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in timm.list_models():
        if any(word in name for word in _LARGE):
            continue
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
        except Exception:  # some build their tables in ways that a device without memory does not know
            continue
        if parameters < LARGEST:
            found[registry._model_to_module[name]].append((parameters, name))
    for module, models in sorted(found.items()):
        yield from ((name, module) for _, name in sorted(models)[:EACH])


def prepared(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Build and perturb one model, at 64 x 64 where it allows that; return it with two images."""
    for size in (64, 128, None):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, num_classes=10, **({"img_size": size} if size else {}))
        except (TypeError, AssertionError, ValueError):
            model = timm.create_model(name, num_classes=10)
        image = torch.randn(2, 3, *((size, size) if size else model.default_cfg["input_size"][1:]))
        try:
            perturb(model, [image])
            break
        except Exception:
            if size is None:
                raise
    return model, image


def export(name: str, path: Path, *, dynamo: bool) -> None:
    """Build and export one model."""
    torch.set_num_threads(2)
    timm.layers.set_fused_attn(dynamo)
    model, image = prepared(name)
    for free in (not dynamo, False):
        try:
            onnx_export(
                model, str(path), image[:1], dynamic_size=free, use_dynamo=dynamo, check=False,
                input_names=["image"], output_names=["scores"], external_data=False,
            )  # fmt: skip
            common.session(path).run(None, {"image": image.numpy()})
            return
        except Exception:
            if not free:
                raise


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__, exporter=["timm", "timm-dynamo"])
    models = list(smallest())
    for exporter in [args.exporter] if args.exporter else ("timm", "timm-dynamo"):
        dynamo = exporter == "timm-dynamo"
        jobs = (
            common.Job(name, family, partial(export, name, dynamo=dynamo), dims={"batch": 2, "height": 64, "width": 64})
            for number, (name, family) in enumerate(models)
            if not dynamo or number % 2 == 0
        )
        common.run(jobs, args, exporter=exporter, version=timm.__version__)


if __name__ == "__main__":
    main()
