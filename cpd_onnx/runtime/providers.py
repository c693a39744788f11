"""Execution providers of onnxruntime as text: `cuda`, `tensorrt:precision=fp16,cache=DIR`, `CUDAExecutionProvider`.

The short keys (device, precision, cache, threads) mean the same for every provider that has them; the documented keys
of onnxruntime are accepted too, except those that take pointers or load libraries. Source: the pages on CUDA, TensorRT,
OpenVINO, CoreML, DirectML, QNN, XNNPACK and MIGraphX at https://onnxruntime.ai/docs/execution-providers/.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from cpd_onnx.options import natural, neighbours

CPU = "CPUExecutionProvider"
Pair: TypeAlias = "tuple[str, dict[str, str]]"
"""Name of a provider and its options, as onnxruntime takes them."""
_Read: TypeAlias = "Callable[[str], dict[str, str]]"
"""Turns the value of a key into options of onnxruntime; raises ValueError for another value."""
_ENDING = "ExecutionProvider"


def _number(name: str) -> _Read:
    """Return a reader of a whole number."""
    return lambda text: {name: str(natural(text))}


def _text(*names: str, **fixed: str) -> _Read:
    """Return a reader of any text, which sets all names to it, and further options to fixed values."""

    def read(text: str) -> dict[str, str]:
        if not text:
            raise ValueError("the value is empty")
        return {**fixed, **dict.fromkeys(names, text)}

    return read


def _choice(values: Mapping[str, dict[str, str]]) -> _Read:
    """Return a reader of one of several values, whose case does not matter; each stands for options."""
    known = {value.lower(): options for value, options in values.items()}

    def read(text: str) -> dict[str, str]:
        if text.lower() not in known:
            raise ValueError(f"{text!r} is not one of {', '.join(values)}")
        return known[text.lower()]

    return read


def _one_of(name: str, *values: str) -> _Read:
    return _choice({value: {name: value} for value in values})


def _switches(no: str, yes: str, *names: str) -> dict[str, _Read]:
    """Return readers of switches, by name, which onnxruntime wants spelled as `no` and `yes`."""
    spelled = {"0": no, "1": yes, "false": no, "true": yes}
    return {name: _choice({text: {name: value} for text, value in spelled.items()}) for name in names}


def _numbers(*names: str) -> dict[str, _Read]:
    return {name: _number(name) for name in names}


def _texts(*names: str) -> dict[str, _Read]:
    return {name: _text(name) for name in names}


def _precision(**keys: str) -> _Read:
    """Return a reader of a precision, from the key that switches each on; fp32 is that of the model."""
    return _choice({"fp32": {}, **{precision: {key: "1"} for precision, key in keys.items()}})


_CUDA: dict[str, _Read] = {
    "device": _number("device_id"),
    **_numbers("device_id", "gpu_mem_limit", "sdpa_kernel", "tunable_op_max_tuning_duration_ms"),
    "arena_extend_strategy": _one_of("arena_extend_strategy", "kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv_algo_search": _one_of("cudnn_conv_algo_search", "EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    **_switches(
        "0", "1", "do_copy_in_default_stream", "use_ep_level_unified_stream", "cudnn_conv_use_max_workspace",
        "cudnn_conv1d_pad_to_nc1d", "enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "use_tf32",
        "prefer_nhwc", "fuse_conv_bias", "tunable_op_enable", "tunable_op_tuning_enable",
    ),
}  # fmt: skip  # a table
_TENSORRT: dict[str, _Read] = {
    "device": _number("device_id"),
    "precision": _precision(fp16="trt_fp16_enable", bf16="trt_bf16_enable", int8="trt_int8_enable"),
    "cache": _text(
        "trt_engine_cache_path", "trt_timing_cache_path", trt_engine_cache_enable="1", trt_timing_cache_enable="1"
    ),
    **_numbers(
        "device_id", "trt_max_workspace_size", "trt_max_partition_iterations", "trt_min_subgraph_size", "trt_dla_core",
        "trt_builder_optimization_level", "trt_auxiliary_streams",
    ),
    **_switches(
        "0", "1", "trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_int8_use_native_calibration_table",
        "trt_dla_enable", "trt_engine_cache_enable", "trt_dump_subgraphs", "trt_force_sequential_engine_build",
        "trt_context_memory_sharing_enable", "trt_layer_norm_fp32_fallback", "trt_timing_cache_enable",
        "trt_force_timing_cache", "trt_detailed_build_log", "trt_build_heuristics_enable", "trt_cuda_graph_enable",
        "trt_sparsity_enable", "trt_engine_hw_compatible",
    ),
    **_texts(
        "trt_int8_calibration_table_name", "trt_engine_cache_path", "trt_engine_cache_prefix", "trt_timing_cache_path",
        "trt_tactic_sources", "trt_profile_min_shapes", "trt_profile_max_shapes", "trt_profile_opt_shapes",
    ),
}  # fmt: skip  # a table
_OPENVINO: dict[str, _Read] = {
    "device": _text("device_type"),
    "precision": _choice({
        "f16": {"precision": "FP16"}, "f32": {"precision": "FP32"}, "fp16": {"precision": "FP16"},
        "fp32": {"precision": "FP32"}, "accuracy": {"precision": "ACCURACY"},
    }),
    "cache": _text("cache_dir"),
    "threads": _number("num_of_threads"),
    **_texts("device_type", "cache_dir", "reshape_input", "layout"),
    **_numbers("num_of_threads", "num_streams"),
    "model_priority": _one_of("model_priority", "DEFAULT", "LOW", "MEDIUM", "HIGH"),
    **_switches("False", "True", "enable_opencl_throttling", "enable_qdq_optimizer", "disable_dynamic_shapes"),
}  # fmt: skip  # a table
_COREML: dict[str, _Read] = {
    "device": _one_of("MLComputeUnits", "CPUOnly", "CPUAndNeuralEngine", "CPUAndGPU", "ALL"),
    "cache": _text("ModelCacheDirectory"),
    "ModelFormat": _one_of("ModelFormat", "MLProgram", "NeuralNetwork"),
    "MLComputeUnits": _one_of("MLComputeUnits", "CPUOnly", "CPUAndNeuralEngine", "CPUAndGPU", "ALL"),
    "SpecializationStrategy": _one_of("SpecializationStrategy", "Default", "FastPrediction"),
    **_switches(
        "0", "1", "RequireStaticInputShapes", "EnableOnSubgraphs", "ProfileComputePlan",
        "AllowLowPrecisionAccumulationOnGPU",
    ),
    **_texts("ModelCacheDirectory"),
}  # fmt: skip  # a table
_DIRECTML: dict[str, _Read] = {
    "device": _number("device_id"),
    **_numbers("device_id"),
    "performance_preference": _one_of("performance_preference", "default", "high_performance", "minimum_power"),
    "device_filter": _one_of("device_filter", "gpu", "npu", "any"),
    **_switches("false", "true", "disable_metacommands", "enable_graph_capture"),
}
_QNN: dict[str, _Read] = {
    "device": _one_of("backend_type", "cpu", "gpu", "htp"),
    "precision": _choice({"fp32": {"enable_htp_fp16_precision": "0"}, "fp16": {"enable_htp_fp16_precision": "1"}}),
    "backend_type": _one_of("backend_type", "cpu", "gpu", "htp"),
    "htp_performance_mode": _one_of(
        "htp_performance_mode", "burst", "balanced", "default", "high_performance", "high_power_saver",
        "low_balanced", "extreme_power_saver", "low_power_saver", "power_saver", "sustained_high_performance",
    ),
    "htp_graph_finalization_optimization_mode": _one_of("htp_graph_finalization_optimization_mode", "0", "1", "2", "3"),
    **_numbers("device_id", "vtcm_mb", "soc_model", "htp_arch"),
    **_switches("0", "1", "enable_htp_fp16_precision", "offload_graph_io_quantization"),
}  # fmt: skip  # a table
_XNNPACK: dict[str, _Read] = {"threads": _number("intra_op_num_threads"), **_numbers("intra_op_num_threads")}
_MIGRAPHX: dict[str, _Read] = {
    "device": _number("device_id"),
    "precision": _precision(fp16="migraphx_fp16_enable", int8="migraphx_int8_enable"),
    **_numbers("device_id"),
    **_switches("0", "1", "migraphx_fp16_enable", "migraphx_int8_enable"),
}
_SHORT: dict[str, tuple[str, Mapping[str, _Read]]] = {
    "cpu": (CPU, {}),
    "cuda": ("CUDAExecutionProvider", _CUDA),
    "tensorrt": ("TensorrtExecutionProvider", _TENSORRT),
    "openvino": ("OpenVINOExecutionProvider", _OPENVINO),
    "coreml": ("CoreMLExecutionProvider", _COREML),
    "directml": ("DmlExecutionProvider", _DIRECTML),
    "qnn": ("QNNExecutionProvider", _QNN),
    "xnnpack": ("XnnpackExecutionProvider", _XNNPACK),
    "migraphx": ("MIGraphXExecutionProvider", _MIGRAPHX),
}
"""Full name and keys of each provider, by its short name."""
SHORT_NAMES = tuple(_SHORT)
_KEYS = dict(_SHORT.values())
_FULL = {short: full for short, (full, _) in _SHORT.items()} | {full.lower(): full for full in _KEYS}
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
"""Kind of memory of onnxruntime in which a provider computes, where it is not main memory."""


def parse(text: str) -> Pair:
    """Return the full name and the options of a provider; raises ValueError for keys or values that it does not have.

    A name that is not known here is returned as it is: onnxruntime may have it.

    >>> parse("tensorrt:device=1,precision=fp16")
    ('TensorrtExecutionProvider', {'device_id': '1', 'trt_fp16_enable': '1'})
    >>> parse("openvino:device=HETERO:GPU,CPU,precision=f16")
    ('OpenVINOExecutionProvider', {'device_type': 'HETERO:GPU,CPU', 'precision': 'FP16'})
    """
    name, options = _split(text)
    found: dict[str, str] = {}
    for key, value in options.items():
        try:
            found |= _reader(name, key)(value)
        except ValueError as error:
            raise ValueError(f"{label(name)}: {key}: {error}") from error
    return name, found


def read(text: str) -> str:
    """Return the text of a provider with its full name, as it is recorded; raises ValueError like `parse`.

    >>> read("cuda:device=1"), read("cpu")
    ('CUDAExecutionProvider:device=1', 'CPUExecutionProvider')
    """
    name, _ = parse(text)
    _, mark, options = text.partition(":")
    return f"{name}{mark}{options}"


def label(text: str) -> str:
    """Return a provider as it is shown: without the ending of its name.

    >>> label("CPUExecutionProvider"), label("CUDAExecutionProvider:device=1")
    ('CPU', 'CUDA:device=1')
    """
    name, mark, options = text.partition(":")
    return f"{name.removesuffix(_ENDING)}{mark}{options}"


def with_fallbacks(text: str, threads: int, available: Collection[str]) -> list[Pair]:
    """Return the providers for a session: that of the text, and those that compute what it cannot.

    Args:
        text: The provider, see `parse`.
        threads: Number of threads, which OpenVINO and XNNPACK do not take from the session; 0 for their default.
        available: Names of the providers that onnxruntime has.
    """
    name, options = parse(text)
    if threads and "threads" in _KEYS.get(name, {}):
        options = _reader(name, "threads")(str(threads)) | options
    pairs = [(name, options)]
    if name == "TensorrtExecutionProvider" and "CUDAExecutionProvider" in available:
        device = {key: value for key, value in options.items() if key == "device_id"}
        pairs.append(("CUDAExecutionProvider", device))
    return pairs if name == CPU else [*pairs, (CPU, {})]


def memory_of(name: str, options: Mapping[str, str]) -> tuple[str, int]:
    """Return the kind and the number of the device in whose memory a provider computes, as onnxruntime takes them."""
    kind = _DEVICES.get(name, "cpu")
    return kind, int(options.get("device_id", 0)) if kind != "cpu" else 0


def _split(text: str) -> tuple[str, dict[str, str]]:
    """Return the full name of a provider and the values of its keys.

    A value may contain commas: a part without "=" belongs to the value before it.
    """
    given, mark, rest = text.partition(":")
    name = _FULL.get(given.lower(), given)
    options: dict[str, str] = {}
    key = ""
    for part in rest.split(",") if mark else ():
        before, sign, value = part.partition("=")
        if sign:
            key = before.strip()
        elif not key:
            raise ValueError(f"{part!r} is not KEY=VALUE, as in {_example(name)}")
        if sign and key in options:
            raise ValueError(f"{label(name)}: {key} is given twice")
        options[key] = value if sign else f"{options[key]},{part}"
    return name, options


def _example(name: str) -> str:
    keys = _KEYS.get(name, {})
    return f"{name.removesuffix(_ENDING).lower()}:{next(iter(keys))}=0" if keys else "cuda:device=0"


def _reader(name: str, key: str) -> _Read:
    """Return the reader of a key; raises ValueError for another than those of the provider."""
    keys = _KEYS.get(name)
    if keys is None:
        raise ValueError(f"{name!r} is not a provider whose options are known: {', '.join(SHORT_NAMES)}")
    if not keys:
        raise ValueError("this provider has no options")
    if key not in keys:
        raise ValueError(f"no such option{neighbours(key, keys)}: choose among {', '.join(keys)}")
    return keys[key]
