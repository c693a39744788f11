"""Batch normalisations that an exporter folded into convolutions: put back for training, folded again at the end.

The restored one takes away the moments of what runs through it, as measured on data, and gives those that the original
has in the same place: for an unpruned network the function does not change, a pruned one has activations of the right
mean and spread again before the first update. Folding gives the convolution's own weight and bias new values, and the
file keeps its nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor

from cpd_onnx.errors import CpdError
from cpd_onnx.ir.model import load
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.inference import fold as shapes_of
from cpd_onnx.torch.module import OnnxModule
from cpd_onnx.torch.operators.norm import BatchNorm

Array = npt.NDArray[Any]

EPSILON = 1e-5


@dataclass(frozen=True)
class Restored:
    """One normalisation that was put back: the convolution's tensors, and the four of its own."""

    weight: str
    bias: str
    scale: str
    shift: str
    mean: str
    var: str


def restore(model: ModelProto) -> tuple[ModelProto, tuple[Restored, ...]]:
    """A copy of the model with a BatchNormalization behind each convolution that looks as if it had lost one.

    That is one with a weight and a bias of its own, more than one pixel, and an activation, a sum or another
    convolution behind it.
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    uses = Counter(name for node in graph.node for name in node.input)
    outputs = {info.name for info in graph.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    pixels = _pixels(model)
    found: list[Restored] = []
    for node in list(graph.node):
        own = len(node.input) == 3 and all(name in stored and uses[name] == 1 for name in node.input[1:])
        followers = (
            [n for n in graph.node if node.output and node.output[0] in n.input] if node.op_type == "Conv" else []
        )
        if not own or node.output[0] in outputs or not any(map(_follows, followers)):
            continue
        if pixels.get(node.output[0], 0) > 1 and stored[node.input[1]].data_type == 1:
            found.append(_insert(graph, node, followers, stored[node.input[1]].dims[0]))
    return made, tuple(found)


def _follows(node: NodeProto) -> bool:
    """Whether a node comes behind normalised convolutions; heads of detectors and maps of classes go elsewhere."""
    return traits_of(node).follows_normalisation or traits_of(node).is_activation


def _pixels(model: ModelProto) -> dict[str, int]:
    """Product of the spatial sizes of the main graph's tensors, where they are known."""
    values = shapes_of(load(model)).scope.values
    return {name: int(np.prod(v.shape[2:])) for name, v in values.items() if v.shape is not None and len(v.shape) > 2}


def _insert(graph: GraphProto, node: NodeProto, followers: Sequence[NodeProto], width: int) -> Restored:
    name = node.output[0]
    names = [f"{name}.restored.{part}" for part in ("scale", "shift", "mean", "var")]
    # As these stand it is the identity.
    starts = (np.ones(width), np.zeros(width), np.zeros(width), np.full(width, 1 - EPSILON))
    graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), tensor) for tensor, array in zip(names, starts, strict=True)
    )
    for follower in followers:
        for slot, taken in enumerate(follower.input):
            if taken == name:
                follower.input[slot] = f"{name}.restored"
    made = helper.make_node(
        "BatchNormalization", [name, *names], [f"{name}.restored"], f"{node.name or name}.restored", epsilon=EPSILON
    )
    graph.node.insert(list(graph.node).index(node) + 1, made)
    return Restored(node.input[1], node.input[2], *names)


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and variance of what runs through a normalisation [channels]."""

    mean: Tensor
    var: Tensor


def measure(
    module: OnnxModule, restored: Sequence[Restored], batches: Iterable[Sequence[Tensor]]
) -> dict[str, ChannelMoments]:
    """Moments of what restored normalisations get, by the names of the convolutions' weights.

    Args:
        module: the imported model, with normalisations that train.
        restored: what `restore` put in.
        batches: inputs in the order of the graph.
    """
    sums: dict[int, list[Tensor]] = {}

    def note(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        x, mean = arguments[0].detach().double(), arguments[3]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = torch.tensor(float(x.numel() // x.shape[1]))
        new = [count, x.sum(axes), x.square().sum(axes)]
        old = sums.get(id(mean))
        sums[id(mean)] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    module.eval()
    with torch.no_grad():
        for inputs in batches:
            module(*inputs)
    for hook in hooks:
        hook.remove()
    found = {}
    for entry in restored:
        if id(_tensor(module, entry.mean)) in sums:
            count, total, squares = sums[id(_tensor(module, entry.mean))]
            found[entry.weight] = ChannelMoments(
                total / count, (squares / count - (total / count).square()).clamp(min=0)
            )
    return found


def begin(
    module: OnnxModule,
    restored: Sequence[Restored],
    own: Mapping[str, ChannelMoments],
    wanted: Mapping[str, ChannelMoments],
) -> None:
    """Set restored normalisations: they take away their own moments and give the wanted ones.

    With a network's own moments wanted, the function stays as it was. With those of its original, a pruned network has
    activations of the original's mean and spread from the first step on, as one has whose normalisations were not
    folded. The filters before them are brought to a common size, which a normalisation takes no notice of.
    """
    with torch.no_grad():
        for entry in restored:
            if entry.weight not in own:
                continue
            mine, target = own[entry.weight], wanted.get(entry.weight, own[entry.weight])
            scale, shift, mean, var = (
                _tensor(module, name) for name in (entry.scale, entry.shift, entry.mean, entry.var)
            )
            size = _shrink(_tensor(module, entry.weight), _tensor(module, entry.bias))
            mean.copy_(mine.mean / size)
            var.copy_(mine.var / size.square())
            spread = (mine.var / size.square() + EPSILON).sqrt()
            # A channel that says nothing is not blown up.
            gain = torch.where(mine.var > EPSILON * target.var, (target.var / mine.var).sqrt(), 1.0)
            scale.copy_(spread * size * gain)
            shift.copy_(target.mean)


def _shrink(weight: Tensor, bias: Tensor) -> Tensor:
    """Give each filter the size that trained ones have beside a normalisation, and say by how much it was larger.

    Folding made them larger or smaller. The normalisation behind takes no notice, but how fast they learn depends on
    it: an update of Adam is of one size whatever the weights'.
    """
    axes = tuple(range(1, weight.ndim))
    inputs = weight[0].numel()
    size = (weight.double().square().mean(axes) * inputs).sqrt()
    size = torch.where(size > 0, size, 1.0)
    weight.copy_(weight / size.reshape(-1, *[1] * (weight.ndim - 1)))
    bias.copy_(bias / size)
    return size


def _tensor(module: OnnxModule, name: str) -> Tensor:
    found = getattr(module, module.names[name])
    assert isinstance(found, Tensor)
    return found


def refold(values: Mapping[str, Array], restored: Sequence[Restored]) -> dict[str, Array]:
    """The values without those of restored normalisations, which go into the convolutions' weights and biases."""
    result = dict(values)
    for entry in restored:
        scale, shift, mean, var = (
            result.pop(name).astype(np.float64) for name in (entry.scale, entry.shift, entry.mean, entry.var)
        )
        weight, bias = (result[name] for name in (entry.weight, entry.bias))
        gain = scale / np.sqrt(var + EPSILON)
        result[entry.weight] = (weight * gain.reshape(-1, *[1] * (weight.ndim - 1))).astype(weight.dtype)
        result[entry.bias] = ((bias - mean) * gain + shift).astype(bias.dtype)
    return result


def calibrate(module: OnnxModule, batches: Iterable[Sequence[Tensor]]) -> None:
    """Replace the statistics of all normalisations by their averages over batches; nothing else is trained.

    Raises:
        CpdError: the model has none, or there was no batch.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    if not layers:
        raise CpdError("the model has no BatchNormalization whose statistics could be estimated; train it instead")
    module.train()
    momenta = [layer.momentum for layer in layers]
    count = 0
    with torch.no_grad():
        for count, inputs in enumerate(batches, start=1):
            for layer in layers:
                layer.momentum = 1.0 / count
            module(*inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    module.eval()
    if not count:
        raise CpdError("the data gave no batch to estimate statistics from")
