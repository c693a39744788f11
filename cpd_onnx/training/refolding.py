"""Batch normalisations that an exporter folded into convolutions: restored for training and refolded at the end.

A restored normalisation standardizes its input by moments measured on data, and scales it to the moments that the
original has at the same place: the function of an unpruned network does not change, and a pruned one starts with
activations of the original's mean and variance. Refolding changes the values of the convolution's weight and bias
only; the nodes of the file stay the same.
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
    """One restored normalisation: names of the convolution's weight and bias, and of its own four tensors."""

    weight: str
    bias: str
    scale: str
    shift: str
    mean: str
    var: str


def restore(model: ModelProto) -> tuple[ModelProto, tuple[Restored, ...]]:
    """Return a copy of the model with a BatchNormalization after each convolution into which one was probably folded.

    These are the convolutions with a weight and a bias used nowhere else, an output of more than one pixel, and one of
    the operators in `_AFTER` next.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
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
    return copy, tuple(found)


def _follows(node: NodeProto) -> bool:
    """Whether a node comes behind normalised convolutions; heads of detectors and maps of classes go elsewhere."""
    return traits_of(node).follows_normalisation or traits_of(node).is_activation


def _pixels(model: ModelProto) -> dict[str, int]:
    """Return the number of pixels of the main graph's tensors with known spatial sizes."""
    values = shapes_of(load(model)).scope.values
    return {name: int(np.prod(v.shape[2:])) for name, v in values.items() if v.shape is not None and len(v.shape) > 2}


def _insert(graph: GraphProto, node: NodeProto, followers: Sequence[NodeProto], width: int) -> Restored:
    name = node.output[0]
    names = [f"{name}.restored.{part}" for part in ("scale", "shift", "mean", "var")]
    # With these values it is the identity.
    starts = (np.ones(width), np.zeros(width), np.zeros(width), np.full(width, 1 - EPSILON))
    graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), tensor) for tensor, array in zip(names, starts, strict=True)
    )
    for follower in followers:
        for slot, taken in enumerate(follower.input):
            if taken == name:
                follower.input[slot] = f"{name}.restored"
    norm = helper.make_node(
        "BatchNormalization", [name, *names], [f"{name}.restored"], f"{node.name or name}.restored", epsilon=EPSILON
    )
    graph.node.insert(list(graph.node).index(node) + 1, norm)
    return Restored(node.input[1], node.input[2], *names)


@dataclass(frozen=True)
class InputMoments:
    """Mean and variance of the input of a normalisation [channels]."""

    mean: Tensor
    var: Tensor


def measure(
    module: OnnxModule, restored: Sequence[Restored], batches: Iterable[Sequence[Tensor]]
) -> dict[str, InputMoments]:
    """Return the moments of the inputs of restored normalisations, by the names of the convolutions' weights.

    Args:
        module: The imported model, with trainable normalisations.
        restored: The normalisations that `restore` added.
        batches: Inputs in the order of the graph.
    """
    sums: dict[int, list[Tensor]] = {}

    def accumulate(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        x, mean = arguments[0].detach().double(), arguments[3]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = torch.tensor(float(x.numel() // x.shape[1]))
        new = [count, x.sum(axes), x.square().sum(axes)]
        old = sums.get(id(mean))
        sums[id(mean)] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    layers = live_layers(module)
    hooks = [layer.register_forward_pre_hook(accumulate) for layer in layers]
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
            found[entry.weight] = InputMoments(total / count, (squares / count - (total / count).square()).clamp(min=0))
    return found


def begin(
    module: OnnxModule,
    restored: Sequence[Restored],
    own: Mapping[str, InputMoments],
    wanted: Mapping[str, InputMoments],
) -> None:
    """Initialize restored normalisations so that they turn a network's own moments into the wanted ones.

    If a network's own moments are wanted, its function does not change. If those of its original are, a pruned network
    has activations of the original's mean and variance from the first step on, like one whose normalisations were
    never folded. The filters before them are scaled to a common norm, to which a normalisation is invariant.
    """
    with torch.no_grad():
        for entry in restored:
            if entry.weight not in own:
                continue
            mine, target = own[entry.weight], wanted.get(entry.weight, own[entry.weight])
            scale, shift, mean, var = (
                _tensor(module, name) for name in (entry.scale, entry.shift, entry.mean, entry.var)
            )
            norm = _normalize_filters(_tensor(module, entry.weight), _tensor(module, entry.bias))
            mean.copy_(mine.mean / norm)
            var.copy_(mine.var / norm.square())
            deviation = (mine.var / norm.square() + EPSILON).sqrt()
            # A channel that is almost constant is not amplified.
            gain = torch.where(mine.var > EPSILON * target.var, (target.var / mine.var).sqrt(), 1.0)
            scale.copy_(deviation * norm * gain)
            shift.copy_(target.mean)


def _normalize_filters(weight: Tensor, bias: Tensor) -> Tensor:
    """Scale each filter to norm one, that of trained filters before a normalisation, and return its previous norm.

    Folding changed the norms. The normalisation after a filter is invariant to its norm, but the learning speed is not:
    an update of Adam has the same size whatever that of the weights.
    """
    axes = tuple(range(1, weight.ndim))
    inputs = weight[0].numel()
    norm = (weight.double().square().mean(axes) * inputs).sqrt()
    norm = torch.where(norm > 0, norm, 1.0)
    weight.copy_(weight / norm.reshape(-1, *[1] * (weight.ndim - 1)))
    bias.copy_(bias / norm)
    return norm


def _tensor(module: OnnxModule, name: str) -> Tensor:
    found = getattr(module, module.names[name])
    assert isinstance(found, Tensor)
    return found


def refold(values: Mapping[str, Array], restored: Sequence[Restored]) -> dict[str, Array]:
    """Return the values without restored normalisations, folded into the convolutions' weights and biases."""
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


def live_layers(module: OnnxModule) -> list[BatchNorm]:
    """Return the normalisations that use the statistics of the batch in training."""
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


def calibrate(module: OnnxModule, batches: Iterable[Sequence[Tensor]]) -> None:
    """Replace the statistics of all normalisations by their averages over batches, without training.

    Raises:
        CpdError: The model has no BatchNormalization, or there was no batch.
    """
    layers = live_layers(module)
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
