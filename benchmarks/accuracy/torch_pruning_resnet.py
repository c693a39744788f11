"""Prune a CIFAR-10 ResNet with zero-padded shortcuts by torch-pruning and export it; needs torch and torch-pruning.

    python benchmarks/accuracy/torch_pruning_resnet.py resnet56.onnx 0.392 pruned.onnx

The network is rebuilt in torch with the weights of the file. torch-pruning does not support the zero-padded shortcuts
(IndexError), so it is restricted as an expert would do: only the first convolution of each block is pruned, and the
pruning ratio is raised until the target MACs are reached.
"""

from __future__ import annotations

import copy
import sys

import onnx
import torch
import torch.nn.functional as F
import torch_pruning as tp
from onnx import numpy_helper
from torch import nn

WIDTHS = (16, 16, 32, 64)


class Block(nn.Module):
    """Residual block of two convolutions with a shortcut without weights."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride, self.pad = stride, width // 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Three stages of blocks; depth is six times their number, plus two."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage in (1, 2, 3):
            first = Block(WIDTHS[stage - 1], WIDTHS[stage], 2 if stage > 1 else 1)
            rest = [Block(WIDTHS[stage], WIDTHS[stage], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


def loaded(path: str) -> ResNet:
    """Return the network with the weights of a file whose initializers have the module's parameter names."""
    weights = {i.name: torch.tensor(numpy_helper.to_array(i)) for i in onnx.load(path).graph.initializer}
    network = ResNet(sum(name.startswith("layer1.") and name.endswith("conv1.weight") for name in weights))
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or any("num_batches_tracked" not in name for name in missing):
        raise SystemExit(f"{path} is not such a ResNet: {missing} missing, {unexpected} too many")
    return network.eval()


def pruned(network: ResNet, target: float) -> nn.Module:
    """Return the largest network within the target MACs, pruned by group magnitude."""
    example = torch.randn(1, 3, 32, 32)
    original, _ = tp.utils.count_ops_and_params(network, example)
    for percent in range(1, 100):
        candidate = copy.deepcopy(network)
        blocks = [module for module in candidate.modules() if isinstance(module, Block)]
        kept = [candidate.conv1, candidate.linear, *(block.conv2 for block in blocks)]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.BasePruner(
            candidate, example, importance=importance, pruning_ratio=percent / 100, ignored_layers=kept
        ).step()
        if tp.utils.count_ops_and_params(candidate, example)[0] <= target * original:
            return candidate
    raise SystemExit(f"the target of {target} of the MACs cannot be reached")


def main() -> None:
    """Read, prune, export."""
    source, target, out = sys.argv[1:]
    network = pruned(loaded(source), float(target)).eval()
    torch.onnx.export(
        network, (torch.randn(1, 3, 32, 32),), out, input_names=["input"], output_names=["logits"], dynamo=False,
        dynamic_axes={"input": {0: "n"}, "logits": {0: "n"}}, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )  # fmt: skip  # BatchNormalization is kept, as in the original file


if __name__ == "__main__":
    main()
