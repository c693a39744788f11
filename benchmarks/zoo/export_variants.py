"""Derive variants of existing models: conversions, rewrites, precisions, layouts of weights.

Environment: pip install onnx==1.23.2 onnxruntime==1.31.1 sympy

    python export_variants.py --out DIR [--only REGEX] [--exporter light|variants]

The sources are the torch exports in DIR; a variant whose source is missing fails.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import common
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper, version_converter
from onnxruntime import quantization as q
from onnxruntime.transformers import float16, optimizer

Transform = Callable[[Path, Path], None]

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
LIGHT_OPSETS = range(10, 26)


def convert(source: Path, path: Path, *, opset: int) -> None:
    """Convert to another opset; weights beside the source stay where they are."""
    model = version_converter.convert_version(onnx.load(source, load_external_data=False), opset)
    onnx.save(model, path)


def fill(source: Path, path: Path) -> None:
    """Replace ConstantOfShape weights by seeded random initializers in a file beside, and calibrate the batch norms."""
    model = onnx.load(source)
    graph, rng = model.graph, np.random.default_rng(0)
    shapes = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    roles = _roles(graph)
    nodes = [n for n in graph.node if n.op_type == "ConstantOfShape" and n.input[0] in shapes]
    for node in nodes:
        graph.node.remove(node)
        value = _weight(rng, shapes[node.input[0]].tolist(), roles.get(node.output[0], ""))
        graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    spent = {node.input[0] for node in nodes}
    for values in (graph.initializer, graph.input):
        for value in [v for v in values if v.name in spent]:
            values.remove(value)
    model.ir_version = 4
    _calibrate(model, path)
    _save_beside(model, path)


def _calibrate(model: onnx.ModelProto, path: Path) -> None:
    """Set the statistics of the batch norms to those of their inputs, in one run of a model that computes them."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    nodes, found = [], {}
    for node in probe.graph.node:
        if node.op_type == "BatchNormalization":
            made = [f"{node.output[0]}.{part}" for part in ("mean", "variance")]
            found |= dict(zip(node.input[3:5], made, strict=True))
            nodes += _statistics(node.input[0], *made)
            node.input[3:5] = made
        nodes.append(node)
    if not found:
        return
    del probe.graph.node[:]
    probe.graph.node.extend(nodes)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found.values())
    onnx.save(probe, path)
    runtime = common.session(path)
    values = runtime.run(list(found.values()), common.random_feeds(runtime.get_inputs()))
    weights = {i.name: i for i in model.graph.initializer}
    for name, value in zip(found, values, strict=True):
        weights[name].CopyFrom(numpy_helper.from_array(value, name))


def _statistics(value: str, mean: str, variance: str) -> list[onnx.NodeProto]:
    """Return nodes of opset 9 that compute the mean of each channel of an image, and its variance, a little enlarged."""
    node, ends = onnx.helper.make_node, {"axes": [0, 2, 3]}
    return [
        node("ReduceMean", [value], [f"{mean}.kept"], **ends),
        node("Squeeze", [f"{mean}.kept"], [mean], **ends),
        node("Sub", [value, f"{mean}.kept"], [f"{mean}.centred"]),
        node("Mul", [f"{mean}.centred"] * 2, [f"{mean}.squares"]),
        node("ReduceMean", [f"{mean}.squares"], [f"{variance}.exact"], **ends, keepdims=0),
        node("ReduceMean", [f"{variance}.exact"], [f"{variance}.mean"]),
        node("Constant", [], [f"{variance}.tenth"], value=numpy_helper.from_array(np.float32([0.1]))),
        node("Mul", [f"{variance}.mean", f"{variance}.tenth"], [f"{variance}.more"]),
        node("Add", [f"{variance}.exact", f"{variance}.more"], [variance]),
    ]


def _save_beside(model: onnx.ModelProto, path: Path) -> None:
    """Save a model with its weights in a file beside it, named as the model without the mark of a draft."""
    location = f"{path.stem.removeprefix('draft-')}.data"
    path.with_name(location).unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=1024)


def _roles(graph: onnx.GraphProto) -> dict[str, str]:
    """Name the role of each value: "<op type>:<input index>" of its first consumer, through Unsqueeze."""
    behind = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Unsqueeze"}
    roles: dict[str, str] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            roles.setdefault(behind.get(name, name), f"{node.op_type}:{index}")
    return roles


def _weight(rng: np.random.Generator, shape: list[int], role: str) -> np.ndarray:
    """Draw a weight that fits its role."""
    if role in ("BatchNormalization:1", "BatchNormalization:4", "Mul:0", "Mul:1"):
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    if len(shape) < 2:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    return rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)


def extended(source: Path, path: Path) -> None:
    """Save the model as optimised by onnxruntime at level EXTENDED."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def fused(source: Path, path: Path, *, kind: str, heads: int, width: int) -> None:
    """Run the transformer optimizer, which must fuse an attention or a normalisation.

    Raises:
        ValueError: nothing was fused.
    """
    model = optimizer.optimize_model(str(source), model_type=kind, num_heads=heads, hidden_size=width, opt_level=0)
    if not any(node.domain == "com.microsoft" for node in model.model.graph.node):
        raise ValueError("nothing was fused")
    model.save_model_to_file(str(path))


class Reader(q.CalibrationDataReader):
    """Four random inputs."""

    def __init__(self, source: Path, dims: dict[str, int] | None = None) -> None:
        """Read the inputs of ``source``; ``dims`` are sizes of symbolic dimensions."""
        inputs = common.session(source).get_inputs()
        self.feeds = iter([common.random_feeds(inputs, high=90, seed=seed, dims=dims) for seed in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input."""
        return next(self.feeds, None)


def static(source: Path, path: Path, *, form: q.QuantFormat, per_channel: bool, prepared: bool = False) -> None:
    """Quantise statically to int8; ``prepared`` runs onnxruntime's preparation before."""
    ready = path.with_suffix(".prepared") if prepared else source
    if prepared:
        q.quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    try:
        q.quantize_static(str(ready), str(path), Reader(source), quant_format=form, per_channel=per_channel)
    finally:
        if prepared:
            ready.unlink(missing_ok=True)


def dynamic(source: Path, path: Path) -> None:
    """Quantise weights, and activations on the fly."""
    q.quantize_dynamic(str(source), str(path), op_types_to_quantize=["Conv", "MatMul", "Gemm", "LSTM"])


def half(source: Path, path: Path, *, keep_io: bool = False) -> None:
    """Convert to float16."""
    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=keep_io), path)


def double(source: Path, path: Path) -> None:
    """Convert every float tensor, type and cast to double."""
    model = onnx.load(source)
    for tensor in _tensors(model.graph):
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    onnx.save(model, path)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """List initializers and tensor attributes of the main graph."""
    yield from graph.initializer
    for node in graph.node:
        yield from (a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)


def external(source: Path, path: Path) -> None:
    """Move the weights to a data file."""
    _save_beside(onnx.load(source), path)


def overridable(source: Path, path: Path) -> None:
    """List the initializers as graph inputs too, as IR version 3 demanded."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3
    onnx.save(model, path)


def constants(source: Path, path: Path) -> None:
    """Turn initializers into Constant nodes."""
    model = onnx.load(source)
    graph = model.graph
    made = [onnx.helper.make_node("Constant", [], [t.name], f"const_{t.name}", value=t) for t in graph.initializer]
    nodes = [*made, *graph.node]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


QDQ = partial(static, form=q.QuantFormat.QDQ, per_channel=True)
QOPERATOR = partial(static, form=q.QuantFormat.QOperator, per_channel=False)
# label, transform, sources
VARIANTS: list[tuple[str, Transform, str]] = [
    ("ort_extended", extended, "resnet18.torchscript mobilenet_v2.dynamo bert.torchscript bert.dynamo gpt2.torchscript "
     "vit_tiny_patch16_224.torchscript vit_tiny_patch16_224.dynamo vit_tiny_patch16_224.dynamo.opset23 llama.dynamo "
     "swinv2_cr_tiny_ns_224.dynamo convnextv2_atto.torchscript efficientnet_b0.dynamo t5_encoder.dynamo "
     "unet_groupnorm.dynamo yolov8_like.torchscript"),
    ("ort_fused", partial(fused, kind="bert", heads=4, width=64),
     "bert.torchscript bert.dynamo bert_sdpa.torchscript bert_sdpa.dynamo distilbert.torchscript roberta.dynamo"),
    ("ort_fused", partial(fused, kind="gpt2", heads=4, width=64), "gpt2.torchscript gpt2.dynamo"),
    ("ort_fused", partial(fused, kind="vit", heads=3, width=192),
     "vit_tiny_patch16_224.torchscript vit_tiny_patch16_224.dynamo"),
    ("ort_fused", partial(fused, kind="bart", heads=4, width=64), "whisper_encoder.torchscript whisper_encoder.dynamo"),
    ("qdq", QDQ, "resnet18.torchscript mobilenet_v2.dynamo vit_tiny_patch16_224.dynamo squeezenet1_1.torchscript "
     "bert.torchscript unet_transpose.torchscript"),
    ("qdq_prepared", partial(QDQ, prepared=True), "mobilenet_v3_small.torchscript yolov8_like.torchscript"),
    ("qoperator", QOPERATOR, "resnet18.torchscript squeezenet1_1.torchscript mobilenet_v2.torchscript"),
    ("dynamic_int8", dynamic, "bert.torchscript squeezenet1_1.torchscript lstm_tagger.torchscript gpt2.dynamo"),
    ("fp16", half, "resnet18.torchscript vit_tiny_patch16_224.dynamo bert.torchscript"),
    ("fp16_keep_io", partial(half, keep_io=True), "mobilenet_v2.dynamo"),
    ("double", double, "mlp.torchscript tied_autoencoder.dynamo glu_mlp.torchscript"),
    ("external", external, "mobilenet_v2.torchscript bert.dynamo"),
    ("overridable", overridable, "resnet18.torchscript.opset9 squeezenet1_1.torchscript"),
    ("constants", constants, "mobilenet_v2.torchscript bert.dynamo"),
    ("opset21", partial(convert, opset=21), "resnet18.torchscript bert.torchscript swin_hf.torchscript"),
    ("opset25", partial(convert, opset=25), "mobilenet_v2.dynamo unet_groupnorm.dynamo"),
]  # fmt: skip


def light_jobs(folder: Path) -> Iterator[common.Job]:
    """List the light models with random weights: as initializers, in Constant nodes, and in other opsets.

    The weights of a model are written once, beside its first form, which the others are made from and refer to.
    """
    for source in sorted(LIGHT.glob("light_*.onnx")):
        name = source.stem.removeprefix("light_")
        filled = folder / f"{name}.light.random.onnx"
        forms: dict[str, Callable[[Path], None]] = {".random": partial(fill, source), "": partial(constants, filled)}
        forms |= {f".opset{o}": partial(convert, filled, opset=o) for o in LIGHT_OPSETS}
        for suffix, build in forms.items():
            yield common.Job(f"{name}.light{suffix}", name.rstrip("_v0123456789"), build)


def variant_jobs(zoo: Path) -> Iterator[common.Job]:
    """List the variants of the torch exports."""
    families = {entry["name"]: entry["family"] for _, entry in common.models(zoo)}
    for label, transform, sources in VARIANTS:
        for source in sources.split():
            path = zoo / source.split(".")[1] / f"{source}.onnx"
            yield common.Job(f"{source}.{label}", families.get(source, ""), partial(transform, path), high=90)


def main() -> None:
    """Derive the variants selected by the command line."""
    args = common.arguments(__doc__, exporter=["light", "variants"])
    if args.exporter != "variants":
        common.run(light_jobs(args.out / "light"), args, exporter="light", version=onnx.__version__)
    if args.exporter != "light":
        common.run(variant_jobs(args.out), args, exporter="variants", version=ort.__version__)


if __name__ == "__main__":
    main()
