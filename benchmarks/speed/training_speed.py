"""Training speed of an imported network compared with the same network written natively in torch.

    python benchmarks/speed/training_speed.py [--model resnet50 --model vit_b_16] [--out results/training_speed.json]

Needs torchvision. The native network is exported with its normalisations in training mode and imported again; both run
forward and backward passes on the same batch, interleaved, eager and compiled. Reported are the ratio of the median
times (above 1: the import is faster) and the largest difference of the outputs in evaluation mode.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch
import torchvision

from cpd_onnx.torch import import_model


def exported(network: torch.nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    """Return the network as an ONNX model without constant folding."""
    stream = io.BytesIO()
    torch.onnx.export(
        network, (x,), stream, dynamo=False, opset_version=17, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False, input_names=["x"], dynamic_axes={"x": {0: "N"}},
    )  # fmt: skip
    return onnx.load_from_string(stream.getvalue())


def step(run: Callable[[torch.Tensor], Any], parameters: list[torch.Tensor], x: torch.Tensor) -> float:
    """Run one forward and backward pass and return its seconds."""
    for p in parameters:
        p.grad = None
    _wait(x)
    started = time.perf_counter()
    output = run(x)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    _wait(x)
    return time.perf_counter() - started


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def compare(name: str, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Return the times of both networks, eager and compiled."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(batch, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = import_model(exported(network, x[:2]), batch_norm="train")
    network, module, x = network.to(device), module.to(device), x.to(device)
    with torch.no_grad():
        difference = float((network.eval()(x) - module.eval()(x)[0]).abs().max())
    network.train()
    module.train()
    result: dict[str, Any] = {"batch": batch, "output_difference": difference}
    for mode in ("eager", "compiled"):
        wrap = torch.compile if mode == "compiled" else lambda m: m
        runs = {
            "native": (wrap(network), list(network.parameters())),
            "imported": (wrap(module), list(module.parameters())),
        }
        times: dict[str, list[float]] = {key: [] for key in runs}
        for number in range(rounds + 2):
            for key, (run, parameters) in runs.items():
                seconds = step(run, parameters, x)
                if number >= 2:
                    times[key].append(seconds)
        medians = {key: statistics.median(values) for key, values in times.items()}
        result[mode] = medians | {"ratio": medians["native"] / medians["imported"]}
        print(name, mode, {k: round(v, 4) for k, v in result[mode].items()}, flush=True)
    return result


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "training_speed.json")
    options = parser.parse_args()
    content: dict[str, Any] = {"torch": metadata.version("torch"), "device": options.device, "results": {}}
    for name in options.model or ["resnet50", "vit_b_16"]:
        content["results"][name] = compare(name, options.batch, options.rounds, options.device)
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
