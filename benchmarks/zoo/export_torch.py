"""Export the torch models with the TorchScript and the dynamo exporter.

Environment: pip install torch torchvision transformers timm onnx==1.23.2 onnxruntime==1.31.1 onnxscript

    python export_torch.py --out DIR [--only REGEX] [--exporter torchscript|dynamo] [--sizes small|full]

The full sizes are twelve architectures as they were published, with a free batch axis, in the subfolder `full`.
"""

import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from perturb import perturb
from torch_models import Net, all_nets, full_size_nets

DEFAULT = {"torchscript": 17, "dynamo": 20}
# further opsets: exporter -> opset -> names
EXTRA = {
    "torchscript": {
        9: "resnet18|mobilenet_v2|squeezenet1_1|densenet121|espcn|lstm_tagger",
        11: "mobilenet_v3_small|shufflenet_v2_x1_0|lraspp_mobilenet_v3_large|unet_transpose|bert",
        13: "mobilenet_v3_large|efficientnet_b0|levit_128s|yolov8_like|gru_tagger|distilbert",
    },
    "dynamo": {
        18: "resnet18|convnextv2_atto|vit_tiny_patch16_224|unet_groupnorm|bert|espcn",
        23: "vit_tiny_patch16_224|unet_groupnorm|rope_gqa|gpt2|groupnorm_resnet|mobilenet_v3_small",
        24: "llama|gemma2|swin_hf|t5|rope_gqa|qwen3|mobilenet_v2",
    },
}


def jobs(net: Net, exporter: str) -> Iterator[common.Job]:
    """List the exports of one model: the default opset and the further ones."""
    opsets = [DEFAULT[exporter], *(o for o, names in EXTRA[exporter].items() if re.fullmatch(names, net.name))]
    for opset in opsets:
        suffix = "" if opset == DEFAULT[exporter] else f".opset{opset}"
        yield common.Job(
            name=f"{net.name}.{exporter}{suffix}",
            family=net.family,
            build=lambda path, opset=opset: export(net, path, exporter, opset),
            high=net.high,
        )


def export(net: Net, path: Path, exporter: str, opset: int) -> None:
    """Build, perturb and export one model; about half of them get a dynamic batch axis."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = perturb(net.make(), net.args(batch=4))
    dynamic = zlib.crc32(f"{net.name} {opset}".encode()) % 2 == 0 and net.family != "detection"
    write = {"torchscript": _torchscript, "dynamo": _dynamo}[exporter]
    try:
        write(net, model, path, opset, dynamic)
    except Exception:
        if not dynamic:
            raise
        write(net, model, path, opset, False)


def _full_size(net: Net, path: Path) -> None:
    """Build and export one model for timing, with unperturbed weights."""
    torch.manual_seed(0)
    _torchscript(net, net.make().eval(), path, DEFAULT["torchscript"], True)


def _torchscript(net: Net, model: torch.nn.Module, path: Path, opset: int, dynamic: bool) -> None:
    """Export by tracing, or by scripting where the model needs control flow."""
    axes = {name: {0: "batch"} for name in net.inputs} if dynamic else None
    torch.onnx.export(
        torch.jit.script(model) if net.scripted else model, net.args(), str(path), dynamo=False,
        opset_version=opset, input_names=list(net.inputs), dynamic_axes=axes,
    )  # fmt: skip


def _dynamo(net: Net, model: torch.nn.Module, path: Path, opset: int, dynamic: bool) -> None:
    """Export with torch.export; example inputs have a batch of 2, since 1 counts as a constant."""
    args = net.args(batch=2 if dynamic else None)
    batch = ({0: torch.export.Dim("batch")},) * len(args)
    shapes = ((batch,) if type(model).__name__ == "Call" else batch) if dynamic else None
    torch.onnx.export(
        model, args, str(path), dynamo=True, opset_version=opset, input_names=list(net.inputs),
        dynamic_shapes=shapes, external_data=False, verbose=False,
    )  # fmt: skip


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__, exporter=list(DEFAULT), sizes=["small", "full"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.sizes == "full":
        jobs_of = ((net, lambda path, net=net: _full_size(net, path)) for net in full_size_nets())
        common.run(
            (common.Job(n.name, n.family, b) for n, b in jobs_of), args, exporter="full", version=torch.__version__
        )
        return
    for net in all_nets():
        for exporter in [args.exporter] if args.exporter else DEFAULT:
            if exporter in net.exporters:
                common.run(jobs(net, exporter), args, exporter=exporter, version=torch.__version__)


if __name__ == "__main__":
    main()
