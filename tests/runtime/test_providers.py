"""Execution providers as text: short names, full names, options, and what is said of unknown ones."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.runtime import providers
from cpd_onnx.runtime import sessions as runtime
from cpd_onnx.runtime.bench import Setting
from tests.support.models import from_text

MODEL = "(float[2, 8] x, float[8, 4] w) => (float[2, 4] y) { y = MatMul(x, w) }"
CUDA, TENSORRT, OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("cpu", providers.CPU, {}),
        ("CPUExecutionProvider", providers.CPU, {}),
        ("cuda", CUDA, {}),
        ("CUDA:device=1,use_tf32=true", CUDA, {"device_id": "1", "use_tf32": "1"}),
        ("cudaexecutionprovider:device=1", CUDA, {"device_id": "1"}),
        ("cuda:cudnn_conv_algo_search=heuristic", CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}),
        ("tensorrt:device=0,precision=fp16", TENSORRT, {"device_id": "0", "trt_fp16_enable": "1"}),
        ("tensorrt:precision=fp32", TENSORRT, {}),
        ("tensorrt:cache=a b", TENSORRT, {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": "a b",
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": "a b",
        }),
        ("tensorrt:trt_profile_min_shapes=x:1x3,y:1x4,device=0", TENSORRT,
         {"trt_profile_min_shapes": "x:1x3,y:1x4", "device_id": "0"}),
        ("openvino:device=CPU,precision=f16,cache=d", OPENVINO, {"device_type": "CPU", "precision": "FP16", "cache_dir": "d"}),
        ("openvino:enable_qdq_optimizer=1", OPENVINO, {"enable_qdq_optimizer": "True"}),
        ("xnnpack:threads=4", "XnnpackExecutionProvider", {"intra_op_num_threads": "4"}),
        ("AbacusExecutionProvider", "AbacusExecutionProvider", {}),
    ],
)  # fmt: skip  # a table
def test_providers_as_onnxruntime_takes_them(text: str, name: str, options: dict[str, str]) -> None:
    assert providers.parse(text) == (name, options)
    assert providers.parse(providers.read(text)) == (name, options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "cuda:devise=1",
            r"CUDA: devise: no such option \(did you mean device.*choose among device, device_id, gpu_mem",
        ),
        ("cuda:device=gpu", "CUDA: device: 'gpu' is not a whole number"),
        ("tensorrt:precision=half", "Tensorrt: precision: 'half' is not one of fp32, fp16, bf16, int8"),
        ("openvino:precision=int8", "is not one of f16, f32, fp16, fp32, accuracy"),
        ("openvino:device=", "OpenVINO: device: the value is empty"),
        ("tensorrt:fp16", "'fp16' is not KEY=VALUE, as in tensorrt:device=0"),
        ("cuda:", "'' is not KEY=VALUE"),
        ("cuda:device=0,device=1", "device is given twice"),
        ("cpu:device=0", "CPU: device: this provider has no options"),
        ("abacus:device=0", "'abacus' is not a provider whose options are known: cpu, cuda, tensorrt, openvino"),
        ("qnn:backend_path=mine.so", "no such option"),
        ("tensorrt:trt_extra_plugin_lib_paths=mine.so", "no such option"),
    ],
)
def test_unknown_keys_and_values_are_answered_with_the_known_ones(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        providers.parse(text)


def test_what_a_provider_cannot_compute_falls_to_the_next() -> None:
    available = [TENSORRT, CUDA, providers.CPU]
    assert providers.with_fallbacks("tensorrt:device=1,precision=fp16", 0, available) == [
        (TENSORRT, {"device_id": "1", "trt_fp16_enable": "1"}), (CUDA, {"device_id": "1"}), (providers.CPU, {})
    ]  # fmt: skip  # pairs
    assert providers.with_fallbacks("tensorrt", 0, [TENSORRT]) == [(TENSORRT, {}), (providers.CPU, {})]
    assert providers.with_fallbacks("cpu", 2, available) == [(providers.CPU, {})]


def test_threads_reach_providers_that_have_threads_of_their_own() -> None:
    assert providers.with_fallbacks("openvino", 2, [])[0] == (OPENVINO, {"num_of_threads": "2"})
    assert providers.with_fallbacks("openvino:threads=4", 2, [])[0] == (OPENVINO, {"num_of_threads": "4"})
    assert providers.with_fallbacks("cuda", 2, [])[0] == (CUDA, {})


def test_memory_is_that_of_the_device() -> None:
    assert providers.memory_of(CUDA, {"device_id": "1"}) == ("cuda", 1)
    assert providers.memory_of(OPENVINO, {"device_id": ""}) == ("cpu", 0)


def test_sessions_get_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(from_text(MODEL), tmp_path / "m.onnx")
    taken = []

    class Started:
        def get_providers(self) -> list[str]:
            return [CUDA, providers.CPU]

    def start(model: Path, options: object, pairs: list[providers.Pair]) -> Started:
        taken.append(pairs)
        return Started()

    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: [CUDA, providers.CPU])
    monkeypatch.setattr(runtime, "_session", start)
    runtime.open_model(tmp_path / "m.onnx", provider="cuda:device=1,prefer_nhwc=1")
    assert taken == [[(CUDA, {"device_id": "1", "prefer_nhwc": "1"}), (providers.CPU, {})]]
    with pytest.raises(
        cpd.UnsupportedError, match="onnxruntime has no provider 'TensorrtExecutionProvider' here: choose"
    ):
        runtime.open_model(tmp_path / "m.onnx", provider="tensorrt:device=0")
    with pytest.raises(cpd.UnsupportedError, match="CUDA: devise: no such option"):
        runtime.open_model(tmp_path / "m.onnx", provider="cuda:devise=0")


def test_settings_stay_readable() -> None:
    assert Setting().words() == "CPU"
    assert Setting(8, 2, providers.read("cuda:device=1")).words() == "CUDA:device=1, batch 8, 2 threads"


def test_the_command_records_full_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(from_text(MODEL), tmp_path / "m.onnx")
    assert main(["bench", str(tmp_path / "m.onnx"), "--provider", "cpu", "--runs", "2", "--json", "-"]) == 0
    assert '"provider": "CPUExecutionProvider"' in capsys.readouterr().out
    assert main(["bench", str(tmp_path / "m.onnx"), "--provider", "cuda:device=0", "--runs", "2"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: onnxruntime has no provider '{CUDA}' here: choose one of {', '.join(runtime.ort.get_available_providers())}"
    ]
    with pytest.raises(SystemExit):
        main(["latency", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "t.json"), "--latency-provider", "cuda:x=1"])
    assert "no such option: choose among device" in capsys.readouterr().err
