"""Eight bits: quantising with onnxruntime's own tools, from samples of ours, to the same bytes each time."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto

from cpd_onnx.data.sources import Source, calibration, inputs_of
from cpd_onnx.deploy.converting import (
    Notify,
    embedded,
    ignore,
    name_nodes,
    quantised_node,
    quiet,
    require_one_message,
    tidied,
    translate_tool_errors,
    valid,
)
from cpd_onnx.deploy.profiles import ACTIVATIONS
from cpd_onnx.errors import TargetError, UnsupportedError
from cpd_onnx.ir.model import Model
from cpd_onnx.ops.traits import operators_with
from cpd_onnx.runtime.sessions import Feed, open_model

CALIBRATIONS = ("minmax", "entropy", "percentile")
"""How the range of an activation is found."""
KEPT_FLOAT = tuple(sorted(operators_with("stays_float")))
"""Operators that stay float: normalisations and scores lose much in eight bits and take little time."""
SAMPLES = 128
"""That calibration looks at."""
OPSET = 13
"""From which on DequantizeLinear has an axis, for a scale each channel."""

Ranges: TypeAlias = Mapping[str, Any]
"""Lowest and highest value of each tensor that calibration looked at: numbers, or lists of one a channel."""

_HISTOGRAMS: dict[str, dict[str, Any]] = {
    "entropy": {"num_bins": 512, "num_quantized_bins": 128},
    "percentile": {"num_bins": 2048, "percentile": 99.99},
}
"""With as many bins as quantised ones, onnxruntime's default, the entropy method never cuts anything off."""
_MASKED = 5e3
"""A tensor that reaches as far is a mask of attention, not an activation: in eight bits all else of it would vanish."""
_ELEMENTS = 1 << 20
"""Of the inputs that calibration runs at once, so that the inner tensors fit into memory."""
_BATCH = 16


@dataclass(frozen=True)
class Quantization:
    """How a model becomes one of 8-bit integers, with QuantizeLinear and DequantizeLinear nodes.

    Attributes:
        calibration: one of `CALIBRATIONS`, the ranges of activations.
        samples: that are looked at for these.
        per_channel: whether each output channel of a weight has a scale of its own.
        activations: "uint8" or "int8"; weights are int8.
        symmetric: whether zero points of activations are zero.
        reduce_range: whether weights keep to seven bits, for processors whose sums saturate.
        quantized_bias: whether biases become int32.
        exclude: patterns (with * and ?) of nodes, weights, tensors and operators that stay float.
        keep_float: operators that stay float whatever they are called.
        seed: of the choice of samples.

    """

    calibration: str = "minmax"
    samples: int = SAMPLES
    per_channel: bool = True
    activations: str = "uint8"
    symmetric: bool = False
    reduce_range: bool = False
    quantized_bias: bool = True
    exclude: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = KEPT_FLOAT
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.calibration not in CALIBRATIONS:
            raise TargetError(f"no calibration is called {self.calibration!r}: choose {', '.join(CALIBRATIONS)}")
        if self.activations not in ACTIVATIONS:
            raise TargetError(f"activations cannot be {self.activations!r}: choose {', '.join(ACTIVATIONS)}")
        if self.samples < 1:
            raise TargetError(f"{self.samples} samples are none to calibrate on: give 1 or more")


def quantize(model: Model, source: Source, options: Quantization | None = None, notify: Notify | None = None) -> Model:
    """Quantise to int8 with onnxruntime's tools: its graph optimisations, its calibration, its QDQ nodes.

    Args:
        model: in float32, at opset 13 or newer.
        source: samples that the ranges of activations are seen on; no labels are needed.
        options: how.
        notify: called with what stays float and why, and with the warnings of the tools.

    Raises:
        UnsupportedError: the model is quantised already, has an older opset, is over 2 GiB, or the tools cannot do it.
        DataError: the data does not fit the model.
        TargetError: a pattern of nodes to exclude names nothing.
    """
    return quantize_recorded(model, source, options, notify)[0]


def quantize_recorded(
    model: Model, source: Source | Ranges, options: Quantization | None = None, notify: Notify | None = None
) -> tuple[Model, Ranges]:
    """Quantise as `quantize` does, and give the ranges of the tensors too, which take the place of samples later."""
    options, notify = options or Quantization(), notify or ignore
    _require_float(model)
    require_one_message(model, "quantised")
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder, quiet(notify):
        path = Path(folder) / "prepared.onnx"
        prepared = _prepared(model, path, notify)
        onnx.save(prepared, path)
        operators = _quantised_operators(options)
        excluded = _excluded(model, prepared, options.exclude)
        ranges = _read(source) if isinstance(source, Mapping) else _ranges(path, model.proto, source, options)
        recorded = _recorded(ranges)
        excluded |= _touching(prepared, _unbounded(ranges), operators, notify)
        proto = _with_integers(prepared, ranges, options, excluded, notify)
    return valid(tidied(proto, model.proto), model, "quantising"), recorded


def _recorded(ranges: Any) -> Ranges:
    """Ranges as JSON has them: [lowest, highest]; what is not finite is null."""
    found = {}
    for name, data in ranges.items():
        bounds = [np.asarray(value, np.float64).astype(object) for value in data.range_value]
        for bound in bounds:
            bound[~np.isfinite(bound.astype(np.float64))] = None
        found[name] = [bound.tolist() for bound in bounds]
    return found


def _read(ranges: Ranges) -> Any:
    """Recorded ranges as onnxruntime's quantiser takes them."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    data = {}
    for name, (low, high) in ranges.items():
        bounds = [np.asarray(np.array(value, np.float64), np.float32) for value in (low, high)]
        data[name] = TensorData(lowest=bounds[0], highest=bounds[1])
    return TensorsData(CalibrationMethod.MinMax, data)


def _require_float(model: Model) -> None:
    """Raise UnsupportedError for what cannot be quantised."""
    node = quantised_node(model)
    if node is not None:
        name = node.name or node.output[0]
        raise UnsupportedError(f"the model is quantised already ({node.op_type} {name!r}): give the float one")
    if any(tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for tensor in model.graph.initializer):
        raise UnsupportedError("the model has 16-bit floats: quantise the float32 one")
    if model.opset < OPSET:
        raise UnsupportedError(
            f"scales for each channel need opset {OPSET} and the model has {model.opset}: convert it first"
        )
    if not inputs_of(model.proto):
        raise UnsupportedError("the model has no inputs: there is nothing to see ranges on")


def _prepared(model: Model, path: Path, notify: Notify) -> ModelProto:
    """The model as onnxruntime's quantiser wants it: constants and batch normalisation folded, shapes known.

    `quant_pre_process` of onnxruntime does the same, but loses weights where it is given a model in memory.
    """
    plain = embedded(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    try:
        with translate_tool_errors("quantised without folding constants and batch normalisation first"):
            ort.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
            plain = onnx.load(path)
    except UnsupportedError as error:
        notify(str(error))
    prepared: ModelProto = onnx.shape_inference.infer_shapes(plain, data_prop=True)
    name_nodes(prepared)
    return prepared


def _quantised_operators(options: Quantization) -> list[str]:
    """The operators that onnxruntime can quantise, but those that stay float."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry} - set(options.keep_float))


def _excluded(model: Model, prepared: ModelProto, patterns: Sequence[str]) -> set[str]:
    """Names of the prepared model's nodes that a pattern names, also by what they were called before."""
    excluded: set[str] = set()
    for pattern in patterns:
        before = {node.name for node in model.graph.node if _is_called(node, pattern) and node.name}
        found = {node.name for node in prepared.graph.node if node.name in before or _is_called(node, pattern)}
        if not found:
            raise TargetError(f"--exclude {pattern!r} matches no node, weight, tensor or operator of the model")
        excluded |= found
    return excluded


def _is_called(node: NodeProto, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (node.name, node.op_type, *node.input, *node.output))


class _Fed:
    """One batch, as onnxruntime's calibration takes it."""

    def __init__(self, feed: Feed) -> None:
        self._feed: Feed | None = feed

    def get_next(self) -> Feed | None:
        """The batch, and then nothing."""
        feed, self._feed = self._feed, None
        return feed


def _ranges(path: Path, proto: ModelProto, source: Source, options: Quantization) -> Any:
    """The range of each tensor on the samples, as onnxruntime's calibration finds it."""
    from onnxruntime.quantization import calibrate

    kinds = {
        "minmax": calibrate.MinMaxCalibrater,
        "entropy": calibrate.EntropyCalibrater,
        "percentile": calibrate.PercentileCalibrater,
    }
    details = _HISTOGRAMS.get(options.calibration, {}) | {"symmetric": options.symmetric}
    operators, place = _quantised_operators(options), path.with_name("augmented.onnx")
    finder = kinds[options.calibration](path, operators, str(place), **details)
    return _found(finder, calibration(proto, source, options.samples, batch=samples_at_once(source), seed=options.seed))


def _found(finder: Any, feeds: Iterable[Feed]) -> Any:
    """What onnxruntime's calibration finds, one batch at a time, as it keeps all inner tensors of what it is given."""
    with translate_tool_errors("onnxruntime cannot prepare the model for finding ranges"):
        finder.augment_graph()
    finder.infer_session = open_model(Path(finder.augmented_model_path), optimise=False)
    for feed in feeds:
        with translate_tool_errors("onnxruntime cannot run the model to find ranges"):
            finder.collect_data(_Fed(feed))
    with translate_tool_errors("onnxruntime cannot find ranges"):
        return finder.compute_data()


def extremes(model: Model, feeds: Iterable[Feed]) -> dict[str, float]:
    """The largest magnitude of each float tensor that nodes of the main graph take or make.

    Raises UnsupportedError where onnxruntime's calibration cannot look at the model.
    """
    from onnxruntime.quantization import calibrate

    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder, quiet(ignore):
        path = Path(folder) / "model.onnx"
        onnx.save(embedded(model), path)
        finder = calibrate.MinMaxCalibrater(path, None, str(path.with_name("augmented.onnx")))
        found = _found(finder, feeds)
    return {name: float(np.abs(np.asarray(data.range_value)).max()) for name, data in found.items()}


def samples_at_once(source: Source) -> int:
    """Samples at once, so that the inner tensors fit into memory."""
    first = next(iter(source.batches(1)), {})
    elements = max((array.size for array in first.values()), default=1)
    return max(1, min(_BATCH, _ELEMENTS // max(1, elements)))


def _unbounded(ranges: Any) -> set[str]:
    """Tensors that are not finite, or reach as far as masks do."""
    return {name for name, data in ranges.items() if not np.all(np.abs(np.asarray(data.range_value)) < _MASKED)}


def _touching(proto: ModelProto, tensors: set[str], operators: list[str], notify: Notify) -> set[str]:
    """Names of the nodes that take or make some tensors, which would be quantised."""
    found = [n for n in proto.graph.node if n.op_type in operators and tensors & {*n.input, *n.output}]
    if found:
        notify(f"{len(found)} nodes stay float because their tensors reach beyond {_MASKED:g}, like {found[0].name!r}")
    return {node.name for node in found}


def _with_integers(
    proto: ModelProto, ranges: Any, options: Quantization, excluded: set[str], notify: Notify
) -> ModelProto:
    """The model with QuantizeLinear and DequantizeLinear nodes; with float biases where it does not work otherwise."""
    failure: UnsupportedError | None = None
    for has_biases in (True, False) if options.quantized_bias else (False,):
        copy = ModelProto()
        copy.CopyFrom(proto)
        try:
            with translate_tool_errors("onnxruntime cannot quantise the model"):
                quantizer = _quantizer(copy, ranges, replace(options, quantized_bias=has_biases), excluded)
                quantizer.quantize_model()
        except UnsupportedError as error:
            failure = failure or error
            continue
        if failure:
            notify(f"biases stay float; with them, {failure}")
        made: ModelProto = quantizer.model.model
        if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
            raise UnsupportedError("there is nothing in the model that can be quantised, or nothing is left to be")
        return made
    assert failure is not None
    raise failure


def _quantizer(proto: ModelProto, ranges: Any, options: Quantization, excluded: set[str]) -> Any:
    from onnxruntime.quantization import QDQQuantizer, QuantType

    kinds = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    extra = {
        "ActivationSymmetric": options.symmetric,
        "QuantizeBias": options.quantized_bias,
        "QDQDisableWeightAdjustForInt32Bias": not options.quantized_bias,
    }
    return QDQQuantizer(
        proto, options.per_channel, options.reduce_range, QuantType.QInt8, kinds[options.activations], ranges, [],
        sorted(excluded), _quantised_operators(options), extra,
    )  # fmt: skip  # one after the other
