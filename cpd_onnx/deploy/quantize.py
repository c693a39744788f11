"""Quantisation to 8-bit integers with onnxruntime's tools, on the given samples, with reproducible bytes."""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from cpd_onnx.data.sources import Source, calibration, inputs_of
from cpd_onnx.deploy.converting import (
    Notify,
    embedded,
    ignore,
    name_nodes,
    optimised,
    quantised_node,
    quiet,
    require_one_message,
    tidied,
    translate_tool_errors,
    valid,
)
from cpd_onnx.deploy.integer_io import converted_at_border
from cpd_onnx.deploy.profiles import ACTIVATIONS
from cpd_onnx.errors import TargetError, UnsupportedError
from cpd_onnx.ir.model import Model
from cpd_onnx.ops.traits import operators_with, traits_of
from cpd_onnx.runtime.sessions import Feed, open_model

CALIBRATIONS = ("minmax", "entropy", "percentile")
"""Methods to find the range of an activation."""
FORMS = ("qdq", "qoperator")
"""Forms of a quantised model: operators between QuantizeLinear and DequantizeLinear nodes, which runtimes fuse, or
integer operators such as QLinearConv, for those that execute nodes one by one."""
KEPT_FLOAT = tuple(sorted(operators_with("stays_float")))
"""Operators that stay float: normalisations and scores lose accuracy in eight bits and take little time (heuristic)."""
SAMPLES = 128
"""Default number of calibration samples (heuristic)."""
OPSET = 13
"""First opset in which DequantizeLinear has an axis, for per-channel scales (ONNX specification)."""

Ranges: TypeAlias = Mapping[str, Any]
"""Lowest and highest value of each calibrated tensor: numbers, or lists of one number a channel."""

_HISTOGRAMS: dict[str, dict[str, Any]] = {
    "entropy": {"num_bins": 512, "num_quantized_bins": 128},
    "percentile": {"num_bins": 2048, "percentile": 99.99},
}
"""Options of onnxruntime's histogram calibrators. By default, its entropy method has as many bins as quantised values
and never clips."""
_MASKED = 5e3
"""Magnitude from which a tensor is taken for an attention mask, whose other values eight bits could not represent
(heuristic)."""
_ELEMENTS = 1 << 20
"""Maximum number of input elements of one calibration run, so that hidden tensors fit into memory (heuristic)."""
_BATCH = 16
"""Maximum number of samples of one calibration run (heuristic)."""


@dataclass(frozen=True)
class Quantization:
    """Options of the quantisation to 8-bit integers.

    Attributes:
        calibration: Method to find the ranges of activations, one of `CALIBRATIONS`.
        samples: Number of calibration samples.
        per_channel: Whether each output channel of a weight has its own scale.
        activations: Element type of activations, "uint8" or "int8"; weights are int8.
        symmetric: Whether zero points of activations are zero.
        reduce_range: Whether weights use seven bits only, for processors with saturating sums.
        quantized_bias: Whether biases become int32.
        exclude: Patterns (with * and ?) of nodes, weights, tensors and operators that stay float.
        keep_float: Operators that stay float.
        float_nodes: First outputs of nodes that stay float; those that a model lacks are ignored.
        apart: Whether nodes that stay float between integers are kept apart from these by a copy (`Sum` of one tensor),
            as onnxruntime would otherwise run them in integers after all.
        seed: Seed for the choice of samples.
        form: Form of the quantised model, one of `FORMS`.
        at_border: Whether inputs are quantised before operators that only reorder them, and outputs dequantised after
            these, so that integers are moved and not floats; the outputs are the same.

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
    float_nodes: tuple[str, ...] = ()
    apart: bool = True
    seed: int = 0
    form: str = "qdq"
    at_border: bool = True

    def __post_init__(self) -> None:
        """Raise TargetError for values out of range."""
        if self.calibration not in CALIBRATIONS:
            raise TargetError(f"calibration must be one of {', '.join(CALIBRATIONS)}, got {self.calibration!r}")
        if self.activations not in ACTIVATIONS:
            raise TargetError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")
        if self.form not in FORMS:
            raise TargetError(f"form of the quantised model must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.samples < 1:
            raise TargetError(f"number of calibration samples must be at least 1, got {self.samples}")


def quantize(model: Model, source: Source, options: Quantization | None = None, notify: Notify | None = None) -> Model:
    """Return the model quantised to int8 with onnxruntime's graph optimisations, calibration and quantiser.

    Args:
        model: Model in float32, at opset 13 or newer.
        source: Calibration samples; labels are not needed.
        options: Options of the quantisation.
        notify: Called with what stays float and why, and with the warnings of the tools.

    Raises:
        UnsupportedError: The model is quantised already, has an older opset, is over 2 GiB, or the tools fail.
        DataError: The data does not fit the model.
        TargetError: A pattern to exclude matches nothing.
    """
    return quantize_recorded(model, source, options, notify)[0]


def quantize_recorded(
    model: Model, source: Source | Ranges, options: Quantization | None = None, notify: Notify | None = None
) -> tuple[Model, Ranges]:
    """Return the result of `quantize` and the ranges of the tensors, which may be passed instead of samples later."""
    options, notify = options or Quantization(), notify or ignore
    _require_float(model)
    require_one_message(model, "quantised")
    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder, quiet(notify):
        path = Path(folder) / "prepared.onnx"
        plain = prepared(model, path, notify)
        onnx.save(plain, path)
        operators = _quantised_operators(options)
        excluded = _excluded(model, plain, options.exclude)
        excluded |= {node.name for node in plain.graph.node if node.output and node.output[0] in options.float_nodes}
        ranges = _read(source) if isinstance(source, Mapping) else _ranges(path, model, source, options)
        recorded = _recorded(ranges)
        excluded |= _adjacent(plain, _unbounded(ranges), operators, notify)
        proto = _with_integers(plain, ranges, options, excluded, notify)
    quantised = valid(tidied(proto, model.proto), model, "quantising")
    return (converted_at_border(quantised) if options.at_border else quantised), recorded


def _recorded(ranges: Any) -> Ranges:
    """Return ranges as plain values for JSON, [lowest, highest]; non-finite numbers become None."""
    found = {}
    for name, data in ranges.items():
        bounds = [np.asarray(value, np.float64).astype(object) for value in data.range_value]
        for bound in bounds:
            bound[~np.isfinite(bound.astype(np.float64))] = None
        found[name] = [bound.tolist() for bound in bounds]
    return found


def _read(ranges: Ranges) -> Any:
    """Return recorded ranges in the type of onnxruntime's quantiser."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    data = {}
    for name, (low, high) in ranges.items():
        bounds = [np.asarray(np.array(value, np.float64), np.float32) for value in (low, high)]
        data[name] = TensorData(lowest=bounds[0], highest=bounds[1])
    return TensorsData(CalibrationMethod.MinMax, data)


def _require_float(model: Model) -> None:
    """Raise UnsupportedError if the model cannot be quantised."""
    node = quantised_node(model)
    if node is not None:
        name = node.name or node.output[0]
        raise UnsupportedError(f"the model is quantised already ({node.op_type} {name!r}): give the float one")
    if any(tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for tensor in model.graph.initializer):
        raise UnsupportedError("the model has 16-bit floats: quantise the float32 one")
    if model.opset < OPSET:
        raise UnsupportedError(
            f"per-channel scales need opset {OPSET} and the model has {model.opset}: convert it first"
        )
    if not inputs_of(model.proto):
        raise UnsupportedError("the model has no inputs: there is nothing to calibrate on")


def prepared(model: Model, path: Path, notify: Notify) -> ModelProto:
    """Return the model as onnxruntime's quantiser requires it: constants and BatchNorm folded, shapes inferred.

    `quant_pre_process` of onnxruntime does the same, but loses weights of a model in memory.
    """
    try:
        plain = optimised(model, path, "quantised without folding constants and batch normalisation first")
    except UnsupportedError as error:
        notify(str(error))
        plain = embedded(model)
    inferred: ModelProto = onnx.shape_inference.infer_shapes(plain, data_prop=True)
    name_nodes(inferred)
    return inferred


def _quantised_operators(options: Quantization) -> list[str]:
    """Return the operators that can be quantised, except those that stay float."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry, *_moving(options)} - set(options.keep_float))


def _moving(options: Quantization) -> dict[str, Any]:
    """Return operators that move integers as well, which onnxruntime's quantiser of integer operators leaves in float.

    Empty for the other form.
    """
    if options.form != "qoperator":
        return {}
    from onnxruntime.quantization.operators.direct_q8 import Direct8BitOp
    from onnxruntime.quantization.registry import QLinearOpsRegistry

    found = operators_with("moves_elements") - operators_with("casts") - set(QLinearOpsRegistry)
    return dict.fromkeys(sorted(found), Direct8BitOp)


def _excluded(model: Model, prepared: ModelProto, patterns: Sequence[str]) -> set[str]:
    """Return the names of the prepared model's nodes that match a pattern, also by their names before preparation."""
    excluded: set[str] = set()
    for pattern in patterns:
        before = {node.name for node in model.graph.node if _matches(node, pattern) and node.name}
        found = {node.name for node in prepared.graph.node if node.name in before or _matches(node, pattern)}
        if not found:
            raise TargetError(f"--exclude {pattern!r} matches no node, weight, tensor or operator of the model")
        excluded |= found
    return excluded


def _matches(node: NodeProto, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (node.name, node.op_type, *node.input, *node.output))


class _SingleBatch:
    """A data reader of onnxruntime's calibration with one batch."""

    def __init__(self, feed: Feed) -> None:
        self._feed: Feed | None = feed

    def get_next(self) -> Feed | None:
        """Return the batch on the first call, and None afterwards."""
        feed, self._feed = self._feed, None
        return feed


def _ranges(path: Path, model: Model, source: Source, options: Quantization) -> Any:
    """Return the range of each tensor on the samples, found by onnxruntime's calibration."""
    from onnxruntime.quantization import calibrate

    kinds = {
        "minmax": calibrate.MinMaxCalibrater,
        "entropy": calibrate.EntropyCalibrater,
        "percentile": calibrate.PercentileCalibrater,
    }
    details = _HISTOGRAMS.get(options.calibration, {}) | {"symmetric": options.symmetric}
    operators, augmented = _quantised_operators(options), path.with_name("augmented.onnx")
    calibrator = kinds[options.calibration](path, operators, str(augmented), **details)
    feeds = calibration(model, source, options.samples, batch=samples_at_once(source), seed=options.seed)
    return _calibrated(calibrator, feeds)


def _calibrated(calibrator: Any, feeds: Iterable[Feed]) -> Any:
    """Return the ranges that a calibrator finds; batches are passed one by one, since it stores all hidden tensors."""
    with translate_tool_errors("onnxruntime cannot prepare the model for finding ranges"):
        calibrator.augment_graph()
    calibrator.infer_session = open_model(Path(calibrator.augmented_model_path), optimise=False)
    for feed in feeds:
        with translate_tool_errors("onnxruntime cannot run the model to find ranges"):
            calibrator.collect_data(_SingleBatch(feed))
    with translate_tool_errors("onnxruntime cannot find ranges"):
        return calibrator.compute_data()


def extremes(model: Model, feeds: Iterable[Feed]) -> dict[str, float]:
    """Return the largest magnitude of each float input and output of the main graph's nodes.

    Raises UnsupportedError if onnxruntime's calibration cannot process the model.
    """
    from onnxruntime.quantization import calibrate

    with tempfile.TemporaryDirectory(prefix="cpd-onnx.") as folder, quiet(ignore):
        path = Path(folder) / "model.onnx"
        onnx.save(embedded(model), path)
        calibrator = calibrate.MinMaxCalibrater(path, None, str(path.with_name("augmented.onnx")))
        found = _calibrated(calibrator, feeds)
    return {name: float(np.abs(np.asarray(data.range_value)).max()) for name, data in found.items()}


def samples_at_once(source: Source) -> int:
    """Return the batch size for calibration at which hidden tensors fit into memory."""
    first = next(iter(source.batches(1)), {})
    elements = max((array.size for array in first.values()), default=1)
    return max(1, min(_BATCH, _ELEMENTS // max(1, elements)))


def _unbounded(ranges: Any) -> set[str]:
    """Return the tensors with values that are not finite or as large as those of attention masks."""
    return {name for name, data in ranges.items() if not np.all(np.abs(np.asarray(data.range_value)) < _MASKED)}


def _adjacent(proto: ModelProto, tensors: set[str], operators: list[str], notify: Notify) -> set[str]:
    """Return the names of the nodes that would be quantised but have one of some tensors as an input or output."""
    found = [n for n in proto.graph.node if n.op_type in operators and tensors & {*n.input, *n.output}]
    if found:
        notify(f"{len(found)} nodes stay float because their tensors exceed {_MASKED:g}, such as {found[0].name!r}")
    return {node.name for node in found}


def _with_integers(
    proto: ModelProto, ranges: Any, options: Quantization, excluded: set[str], notify: Notify
) -> ModelProto:
    """Return the model in the requested form; biases stay float if it fails otherwise."""
    from onnxruntime.quantization.registry import QLinearOpsRegistry

    failure: UnsupportedError | None = None
    for has_biases in (True, False) if options.quantized_bias else (False,):
        copy = ModelProto()
        copy.CopyFrom(proto)
        if options.form == "qoperator":
            _unshare_numbers(copy)
        try:
            with translate_tool_errors("onnxruntime cannot quantise the model"):
                quantizer = _quantizer(copy, ranges, replace(options, quantized_bias=has_biases), excluded)
                with mock.patch.dict(QLinearOpsRegistry, _moving(options)):
                    quantizer.quantize_model()
        except UnsupportedError as error:
            failure = failure or error
            continue
        if failure:
            notify(f"biases stay float; with them, {failure}")
        quantised: ModelProto = quantizer.model.model
        if options.apart:
            _keep_apart(quantised, excluded, set(_quantised_operators(options)))
        if not any(node.op_type == "QuantizeLinear" for node in quantised.graph.node):
            raise UnsupportedError("the model has no node to quantise, or all are excluded")
        return quantised
    assert failure is not None
    raise failure


def _keep_apart(proto: ModelProto, excluded: Container[str], operators: Container[str]) -> None:
    """Copy an input of each node that stays float between integers, so that onnxruntime does not run it in integers.

    onnxruntime replaces DequantizeLinear, operator and QuantizeLinear by one integer operator wherever it has one, also
    if that one is slower or the operator was to stay float. A Sum of one tensor in between prevents it.
    """
    nodes = list(proto.graph.node)
    quantisers = [node for node in nodes if traits_of(node).is_quantizer]
    makers = {name for node in quantisers for name in node.output}
    readers = {node.input[0] for node in quantisers}
    taken = {name for node in nodes for name in (*node.input, *node.output)}
    del proto.graph.node[:]
    for node in nodes:
        stays_float = node.name in excluded or node.op_type not in operators
        slot = next((slot for slot, name in enumerate(node.input) if name in makers), None)
        if (
            stays_float
            and traits_of(node).has_integer_kernel
            and slot is not None
            and readers.intersection(node.output)
        ):
            copy = f"{node.input[slot]}_apart"
            while copy in taken:
                copy += "_"
            taken.add(copy)
            proto.graph.node.add(op_type="Sum", name=f"{copy}_Sum", input=[node.input[slot]], output=[copy])
            node.input[slot] = copy
        proto.graph.node.append(node)


def _unshare_numbers(proto: ModelProto) -> None:
    """Give each node its own copy of a single number: onnxruntime's quantiser replaces that of a Pad for all others."""
    numbers = {tensor.name: tensor for tensor in proto.graph.initializer if math.prod(tensor.dims) == 1}
    seen: set[str] = set()
    for place, node in enumerate(proto.graph.node):
        for slot, name in enumerate(node.input):
            if name in numbers and name in seen:
                own = proto.graph.initializer.add()
                own.CopyFrom(numbers[name])
                own.name = node.input[slot] = f"{name}_{place}_{slot}_"
            seen.add(name)


def _quantizer(proto: ModelProto, ranges: Any, options: Quantization, excluded: set[str]) -> Any:
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    kinds = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    types = (QuantType.QInt8, kinds[options.activations])
    chosen: tuple[Any, ...] = (ranges, [], sorted(excluded), _quantised_operators(options))
    extra = {
        "ActivationSymmetric": options.symmetric,
        "QuantizeBias": options.quantized_bias,
        "QDQDisableWeightAdjustForInt32Bias": not options.quantized_bias,
    }
    how = (proto, options.per_channel, options.reduce_range)
    if options.form == "qoperator":
        return ONNXQuantizer(*how, QuantizationMode.QLinearOps, True, *types, *chosen, extra)  # True: static ranges
    return QDQQuantizer(*how, *types, *chosen, extra)
