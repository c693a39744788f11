"""Quantise and fuse a few models of the zoo by other exporters than torch's with onnxruntime's tools.

Environment: pip install onnx==1.23.2 onnxruntime==1.31.1 sympy; run it after export_tf.py and export_timm.py.

    python export_ort.py --out DIR [--only REGEX]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import common
import onnxruntime
from export_variants import Reader, dynamic, extended
from onnxruntime import quantization as q

SOURCES = (
    "keras/unet_transpose.keras", "keras/separable.keras", "timm/test_resnet", "timm/lcnet_035", "timm/test_vit"
)  # fmt: skip  # a table
DIMS = {"batch": 2, "height": 64, "width": 64}
"""Sizes of the open dimensions of the models of timm."""


def static(source: Path, path: Path, *, form: q.QuantFormat, per_channel: bool) -> None:
    """Quantise statically to int8."""
    q.quantize_static(str(source), str(path), Reader(source, DIMS), quant_format=form, per_channel=per_channel)


VARIANTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "qdq": (partial(static, form=q.QuantFormat.QDQ, per_channel=True), ""),
    "qoperator": (partial(static, form=q.QuantFormat.QOperator, per_channel=False), ""),
    "dynamic_int8": (dynamic, "vit"),
    "extended": (extended, "vit"),
}
"""How a variant is made, by its name, and what the names of its sources contain."""


def jobs(zoo: Path) -> Iterator[common.Job]:
    """List the variants of all sources."""
    for source in SOURCES:
        path = zoo / f"{source}.onnx"
        for kind, (make, part) in VARIANTS.items():
            if part in source:
                yield common.Job(f"{path.stem}.{kind}", path.stem.split(".")[0], partial(make, path), dims=DIMS)


def main() -> None:
    """Make the variants selected by the command line."""
    args = common.arguments(__doc__)
    common.run(jobs(args.out), args, exporter="ort", version=onnxruntime.__version__)


if __name__ == "__main__":
    main()
