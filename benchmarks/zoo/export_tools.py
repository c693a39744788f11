"""Pass existing models of the zoo through the tools that simplify, fuse, convert and quantise ONNX files.

Environment: pip install torch==2.13.0 onnx onnxruntime onnxscript onnxslim onnxsim onnxoptimizer onnxconverter-common sympy
nncf

    python export_tools.py --out DIR [--only REGEX] [--exporter TOOL]

The sources are files of export_optimum.py and export_ultralytics.py in DIR; what is not there is left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import onnxruntime as ort
from export_variants import Reader
from onnxruntime import quantization as q
from onnxruntime.transformers import float16, optimizer

_CONVOLUTIONAL = (
    "optimum/resnet.image-classification optimum/mobilenet_v2.image-classification optimum/convnext.image-classification "
    "optimum/regnet.image-classification optimum/mobilevit.image-classification optimum/poolformer.image-classification "
    "optimum/segformer.image-classification optimum/vits.text-to-audio ultralytics/yolov8n.plain ultralytics/yolo11n-seg.plain "
    "optimum/levit.feature-extraction optimum/glpn.depth-estimation"
)
_ATTENTIVE = (
    "optimum/bert.text-classification optimum/distilbert.text-classification optimum/roberta.text-classification "
    "optimum/deberta-v2.text-classification optimum/vit.image-classification optimum/swin.image-classification "
    "optimum/wav2vec2.audio-classification optimum/gpt2.text-classification optimum/arcee.text-generation optimum/clip.feature-extraction "
    "optimum/t5.text2text-generation-encoder_model optimum/marian.text-generation optimum/albert.text-classification "
    "optimum/modernbert.text-classification optimum/qwen3.text-classification optimum/beit.image-classification"
)
CONVOLUTIONAL, ATTENTIVE = _CONVOLUTIONAL.split(), _ATTENTIVE.split()
ALL = CONVOLUTIONAL + ATTENTIVE
HALF = ALL[::2]


def slim(source: Path, path: Path) -> None:
    """Simplify by onnxslim."""
    import onnxslim

    onnxslim.slim(str(source), str(path))


def simplify(source: Path, path: Path) -> None:
    """Simplify by onnxsim."""
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], path)


def optimise(source: Path, path: Path) -> None:
    """Run the passes of onnxoptimizer that are recommended for inference."""
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source), onnxoptimizer.get_fuse_and_elimination_passes()), path)


def script(source: Path, path: Path) -> None:
    """Fold and rewrite by onnxscript."""
    import onnxscript.optimizer
    import onnxscript.rewriter

    onnx.save(onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(onnx.load(source))), path)


def fuse_by_script(source: Path, path: Path) -> None:
    """Fuse attention, normalisation and rotary embeddings by the rewrites of onnxscript for onnxruntime."""
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(onnx_ir.load(source))
    onnx_ir.save(model, path)


def optimised(source: Path, path: Path, *, level: Any) -> None:
    """Save what a session of onnxruntime runs at a level of its optimisation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


KINDS = {"gpt2": "gpt2", "arcee": "gpt2", "qwen3": "gpt2", "vit": "vit", "swin": "swin", "clip": "clip", "t5": "t5",
         "marian": "bart"}  # fmt: skip
"""Kinds of onnxruntime's optimizer of transformers by type; others are of the kind of bert."""


def fused(source: Path, path: Path, *, half: bool = False) -> None:
    """Run onnxruntime's optimizer of transformers, and convert to half precision if asked.

    Raises:
        ValueError: Nothing was fused.
    """
    kind = KINDS.get(source.stem.partition(".")[0], "bert")
    model = optimizer.optimize_model(str(source), model_type=kind, num_heads=4, hidden_size=64, opt_level=0)
    if not any(node.domain == "com.microsoft" for node in model.model.graph.node):
        raise ValueError("nothing was fused")
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(path))


def half(source: Path, path: Path, *, keep: bool) -> None:
    """Convert to half precision by onnxruntime."""
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=keep), path)


def half_by_common(source: Path, path: Path) -> None:
    """Convert to half precision by onnxconverter-common."""
    from onnxconverter_common import float16 as converter

    onnx.save(converter.convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


def static(source: Path, path: Path, **settings: Any) -> None:
    """Quantise statically, prepared by onnxruntime before."""
    ready = path.with_suffix(".prepared")
    q.quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    try:
        q.quantize_static(str(ready), str(path), Reader(source, _dims(source)), **settings)
    finally:
        ready.unlink(missing_ok=True)


def dynamic(source: Path, path: Path, *, per_channel: bool) -> None:
    """Quantise weights, and activations while the model runs."""
    q.quantize_dynamic(str(source), str(path), per_channel=per_channel)


def blocks(source: Path, path: Path, *, bits: int, form: q.QuantFormat, symmetric: bool) -> None:
    """Quantise the weights of products to 4 or 8 bits in blocks of 32.

    Raises:
        ValueError: No product was quantised.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits, quant_format=form)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    made = quantizer.model.model
    if form == q.QuantFormat.QOperator and not any(node.op_type == "MatMulNBits" for node in made.graph.node):
        raise ValueError("no product was quantised")
    onnx.save(made, path)


def by_nncf(source: Path, path: Path) -> None:
    """Quantise by NNCF after training."""
    import nncf

    data = nncf.Dataset(list(Reader(source, _dims(source)).feeds))
    onnx.save(nncf.quantize(onnx.load(source), data, subset_size=2), path)


def by_modelopt(source: Path, path: Path) -> None:
    """Quantise by NVIDIA's Model Optimizer."""
    from modelopt.onnx.quantization import quantize

    (name, feeds), *_ = next(Reader(source, _dims(source)).feeds).items()
    made = path.with_suffix(".made")
    quantize(str(source), quantize_mode="int8", calibration_data={name: feeds}, output_path=str(made),
             calibration_eps=["cpu"], high_precision_dtype="fp32")  # fmt: skip
    shutil.move(made, path)


QDQ, QOPERATOR = q.QuantFormat.QDQ, q.QuantFormat.QOperator
TOOLS: dict[str, tuple[Callable[..., None], list[str]]] = {
    "onnxslim": (slim, HALF),
    "onnxsim": (simplify, HALF),
    "onnxoptimizer": (optimise, HALF),
    "onnxscript": (script, HALF),
    "onnxscript-fusions": (fuse_by_script, ATTENTIVE),
    "ort-basic": (partial(optimised, level=ort.GraphOptimizationLevel.ORT_ENABLE_BASIC), HALF),
    "ort-extended": (partial(optimised, level=ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED), ALL),
    "ort-transformers": (fused, ATTENTIVE),
    "ort-transformers-fp16": (partial(fused, half=True), ATTENTIVE),
    "ort-fp16": (partial(half, keep=False), ALL[1::2]),
    "ort-fp16-keep-io": (partial(half, keep=True), HALF),
    "onnxconverter-fp16": (half_by_common, ALL[1::2]),
    "ort-qdq": (partial(static, quant_format=QDQ, per_channel=True), HALF),
    "ort-qdq-int16": (partial(static, quant_format=QDQ, activation_type=q.QuantType.QUInt16,
                              weight_type=q.QuantType.QInt8, extra_options={"UseQDQContribOps": True}), CONVOLUTIONAL),
    "ort-qoperator": (partial(static, quant_format=QOPERATOR), ALL[1::2]),
    "ort-dynamic": (partial(dynamic, per_channel=False), HALF),
    "ort-dynamic-channels": (partial(dynamic, per_channel=True), ATTENTIVE[1::2]),
    "ort-int4": (partial(blocks, bits=4, form=QOPERATOR, symmetric=False), ATTENTIVE),
    "ort-int4-qdq": (partial(blocks, bits=4, form=QDQ, symmetric=True), ATTENTIVE[::2]),
    "ort-int8-blocks": (partial(blocks, bits=8, form=QOPERATOR, symmetric=True), ATTENTIVE[1::2]),
    "nncf": (by_nncf, HALF),
    "modelopt": (by_modelopt, CONVOLUTIONAL),
}  # fmt: skip  # a table
PACKAGES = {
    "onnxscript-fusions": "onnxscript",
    "onnxconverter-fp16": "onnxconverter-common",
    "modelopt": "nvidia-modelopt",
}


def _dims(source: Path) -> dict[str, int]:
    """Return sizes of the symbolic dimensions of a source."""
    waves = {"sequence_length": 2000} if source.stem.startswith("wav2vec2") else {}
    return {"num_channels": 3, "height": 64, "width": 64, "batch_size": 2, **waves}


def jobs(zoo: Path, tool: str) -> Iterator[common.Job]:
    """List the sources that a tool is given."""
    transform, sources = TOOLS[tool]
    for source in sources:
        path = zoo / f"{source}.onnx"
        if path.exists():
            yield common.Job(path.stem, path.stem.partition(".")[0], partial(transform, path), dims=_dims(path))


def main() -> None:
    """Pass the sources through the tools selected by the command line."""
    args = common.arguments(__doc__, exporter=list(TOOLS))
    np.random.seed(0)
    for tool in [args.exporter] if args.exporter else TOOLS:
        package = PACKAGES.get(tool, "onnxruntime" if tool.startswith("ort-") else tool)
        common.run(jobs(args.out, tool), args, exporter=tool, version=version(package))


if __name__ == "__main__":
    main()
