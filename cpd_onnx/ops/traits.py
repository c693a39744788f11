"""What each operator is, one row an operator.

Everything that asks what kind of operator a node has asks here: shape inference, combing, repair, proof, deployment and
the import into torch. How channels flow through an operator is its rule (`rules/`), and how it is computed stands in
`evaluate`. An operator without a row has none of the properties, and whoever asks then assumes the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from onnx import NodeProto


@dataclass(frozen=True)
class Traits:
    """Properties of an operator.

    Attributes:
        moves_elements: each element of the result is an element of an input, perhaps in another element type.
        moved: the first of the inputs that these elements come from, and the end, None for all that follow.
        casts: the result is the first input in another element type.
        keeps_zeros: zeros of a weight stay zeros, moved about.
        carries_indices: an index into a table is still one behind it (only through the first input).
        carries_positions: positions along an axis are still positions along it.
        picks: an input says where numbers are taken from, or put.
        reveals_operand: the result shows all that its one operand shows which is no constant.
        fills_sizes: makes axes out of sizes alone.
        reads_sizes: looks at the shape of its input, not at the values.
        is_identity: hands on what it takes.
        is_sum: adds two tensors.
        is_rectifier: cuts off what is below zero.
        is_activation: an activation function, element by element: it saturates, and comes behind normalisations.
        saturates: gives nearly the same for a range of numbers, element by element or along an axis.
        leaps: the result is a float, but steps.
        is_boolean: gives truth values.
        compares: compares two numbers.
        is_random: gives something else each time it runs.
        may_mask: may put a mask of minus infinity onto attention scores.
        follows_normalisation: in networks, comes behind a convolution that was normalised.
        is_quantizer: goes from numbers to the integers that stand for them, or back.
        rounds_activations: rounds activations to integers, be it inside.
        is_quantized: stands in quantised models only.
        stays_float: loses much in eight bits and takes little time.
        is_constant: its result stands in its attributes.
        has_bodies: runs subgraphs, chosen or repeated by data.
        iterates: runs its subgraph several times.
        data_slot: the first input that is data.
        type_slot: the input whose element type the first output has, where it is not the data's.
        shape_slot: the input that lists the sizes of the output.
        output_rank: the number of axes of the output, where it is not the data's.
    """

    moves_elements: bool = False
    moved: tuple[int, int | None] = (0, 1)
    casts: bool = False
    keeps_zeros: bool = False
    carries_indices: bool = False
    carries_positions: bool = False
    picks: bool = False
    reveals_operand: bool = False
    fills_sizes: bool = False
    reads_sizes: bool = False
    is_identity: bool = False
    is_sum: bool = False
    is_rectifier: bool = False
    is_activation: bool = False
    saturates: bool = False
    leaps: bool = False
    is_boolean: bool = False
    compares: bool = False
    is_random: bool = False
    may_mask: bool = False
    follows_normalisation: bool = False
    is_quantizer: bool = False
    rounds_activations: bool = False
    is_quantized: bool = False
    stays_float: bool = False
    is_constant: bool = False
    has_bodies: bool = False
    iterates: bool = False
    data_slot: int = 0
    type_slot: int | None = None
    shape_slot: int | None = None
    output_rank: int | None = None

    def carried(self, count: int) -> range:
        """Those of a node's `count` inputs whose elements are the result's."""
        return range(count)[slice(*self.moved)]


DEFAULT_DOMAINS = ("", "ai.onnx")
"""The two spellings of the domain of the standard's operators."""
MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""
_TABLE: dict[tuple[str, str], Traits] = {}
_FAMILIES = {
    "BipolarQuant": "rounds_activations",
    "ConvInteger": "is_quantized",
    "DequantizeLinear": "is_quantized",
    "DynamicQuantize": "rounds_activations",
    "DynamicQuantizeLinear": "is_quantized",
    "MatMulInteger": "is_quantized",
    "QAttention": "rounds_activations",
    "QEmbed": "rounds_activations",
    "QGemm": "rounds_activations",
    "QLinear": "rounds_activations is_quantized",
    "QMoE": "rounds_activations",
    "Quant": "rounds_activations",
    "QuantizeLinear": "is_quantized",
}
"""What all operators have whose names begin like this, whatever their domain: nobody knows the names of all of them."""


def traits_of(node: NodeProto) -> Traits:
    """Properties of a node's operator."""
    return traits(node.op_type, node.domain)


@cache
def traits(name: str, domain: str = "") -> Traits:
    """Properties of an operator by its name."""
    found = _TABLE.get(("" if domain in DEFAULT_DOMAINS else domain, name))
    return _made(name, "", {}) if found is None else found


def operators_with(trait: str, domain: str = "") -> frozenset[str]:
    """Names of a domain's operators that have a property."""
    return frozenset(name for (own, name), row in _TABLE.items() if own == domain and getattr(row, trait))


def type_slot(node: NodeProto) -> int:
    """The input whose element type a node's first output has."""
    row = traits_of(node)
    if row.type_slot is None or (node.op_type == "QGemm" and len(node.input) > 7):  # then it rounds its result, too
        return row.data_slot
    return row.type_slot


def _made(name: str, words: str, rest: dict[str, int | tuple[int, int | None]]) -> Traits:
    """The properties in a row, with those of the family."""
    words = " ".join([words, *(own for start, own in _FAMILIES.items() if name.startswith(start))])
    return Traits(**dict.fromkeys(words.split(), True) | rest)  # type: ignore[arg-type]  # some are no truth values


def _row(name: str, words: str = "", domains: Sequence[str] = ("",), **rest: int | tuple[int, int | None]) -> None:
    """Enter an operator: the names of the properties that it has, and the others with their values."""
    for domain in domains:
        assert (domain, name) not in _TABLE, f"{domain}::{name} has a row already"
        _TABLE[(domain, name)] = _made(name, words, rest)


_OWN, _BOTH = (MICROSOFT,), ("", MICROSOFT)

# What moves elements, makes them of sizes, or reads sizes; constants.
_row("Cast", "moves_elements casts keeps_zeros carries_indices carries_positions reveals_operand")
_row("CastLike", "casts reveals_operand")
_row("Compress", "picks")
_row("Concat", "moves_elements keeps_zeros reveals_operand follows_normalisation", moved=(0, None))
_row("Constant", "is_constant")
_row("ConstantOfShape", "fills_sizes", shape_slot=0)
_row("DepthToSpace", "reveals_operand")
_row("Expand", "moves_elements keeps_zeros carries_positions reveals_operand fills_sizes")
_row("Flatten", "moves_elements keeps_zeros carries_indices reveals_operand")
_row("Gather", "moves_elements keeps_zeros picks")
_row("GatherElements", "picks")
_row("GatherND", "picks")
_row("Identity", "moves_elements keeps_zeros carries_indices carries_positions reveals_operand is_identity")
_row("Pad", "reveals_operand", _BOTH)
_row("Range", "fills_sizes", _BOTH)
_row("Reshape", "moves_elements keeps_zeros carries_indices carries_positions reveals_operand", shape_slot=1)
_row("ScatterElements", "picks")
_row("ScatterND", "picks")
_row("Shape", "reads_sizes")
_row("Size", "reads_sizes")
_row("Slice", "moves_elements keeps_zeros carries_indices carries_positions reveals_operand picks")
_row("SpaceToDepth", "reveals_operand")
_row("Split", "moves_elements keeps_zeros reveals_operand")
_row("Squeeze", "moves_elements keeps_zeros carries_indices carries_positions reveals_operand")
_row("Tile", "moves_elements keeps_zeros reveals_operand fills_sizes")
_row("Transpose", "moves_elements keeps_zeros carries_indices reveals_operand")
_row("Unsqueeze", "moves_elements keeps_zeros carries_indices carries_positions reveals_operand")
_row("Where", "moves_elements picks may_mask stays_float", moved=(1, 3), type_slot=1)

# Arithmetic, comparison, logic.
_row("Add", "carries_positions reveals_operand is_sum may_mask follows_normalisation")
_row("And", "is_boolean")
_row("ArgMax", "stays_float")
_row("Ceil", "leaps")
_row("CumSum", "stays_float")
_row("Div", "reveals_operand")
_row("Equal", "is_boolean compares")
_row("Floor", "leaps")
_row("Greater", "is_boolean compares")
_row("GreaterOrEqual", "is_boolean compares")
_row("IsInf", "is_boolean")
_row("IsNaN", "is_boolean")
_row("Less", "is_boolean compares")
_row("LessOrEqual", "is_boolean compares")
_row("Max", "may_mask")
_row("Mod", "leaps")
_row("Mul", "carries_positions reveals_operand follows_normalisation")
_row("Neg", "reveals_operand")
_row("Not", "is_boolean")
_row("OneHot", "leaps")
_row("OptionalHasElement", "is_boolean")
_row("Or", "is_boolean")
_row("RegexFullMatch", "is_boolean")
_row("Round", "leaps")
_row("Sign", "leaps")
_row("Sub", "carries_positions reveals_operand may_mask")
_row("Sum", "may_mask")
_row("TopK", "stays_float")
_row("Xor", "is_boolean")

# Layers.
_row("BatchNormalization", "stays_float")
_row("Conv", "follows_normalisation")
_row("DynamicQuantizeLSTM", domains=_OWN, output_rank=4)
_row("EmbedLayerNormalization", domains=_OWN, type_slot=2, output_rank=3)
_row("GatherBlockQuantized", domains=_OWN, type_slot=2)
_row("InstanceNormalization", "stays_float")
_row("LayerNormalization", "stays_float")
_row("MaxPool", "follows_normalisation")

# Activation functions, and what else saturates.
_row("BiasGelu", "is_activation", _OWN)
_row("Celu", "is_activation")
_row("Clip", "is_activation carries_indices")
_row("Elu", "is_activation")
_row("Erf", "saturates")
_row("FastGelu", "is_activation", _OWN)
_row("Gelu", "is_activation", _BOTH)
_row("HardSigmoid", "is_activation")
_row("HardSwish", "is_activation")
_row("Hardmax", "saturates")
_row("LeakyRelu", "is_activation")
_row("LogSoftmax", "saturates")
_row("Mish", "is_activation")
_row("PRelu", "is_activation")
_row("QuickGelu", "is_activation", _OWN)
_row("Relu", "is_activation is_rectifier")
_row("Selu", "is_activation")
_row("Shrink", "saturates")
_row("Sigmoid", "is_activation")
_row("Softmax", "saturates stays_float")
_row("Softplus", "is_activation")
_row("Softsign", "is_activation")
_row("Swish", "is_activation")
_row("Tanh", "is_activation")
_row("ThresholdedRelu", "is_activation")

# Randomness.
_row("Bernoulli", "is_random leaps")
_row("Dropout", "is_random")
_row("Multinomial", "is_random")
_row("RandomNormalLike", "is_random")
_row("RandomUniformLike", "is_random")

# Integers that stand for numbers; see `_FAMILIES` too.
_row("DequantizeLinear", "is_quantizer keeps_zeros reveals_operand", _BOTH, type_slot=1)
_row("MatMulIntegerToFloat", domains=_OWN, type_slot=2)
_row("QGemm", domains=_OWN, type_slot=1)
_row("QLinearConcat", domains=_OWN, data_slot=2)
_row("QuantizeLinear", "is_quantizer keeps_zeros saturates", _BOTH, type_slot=2)

# What runs subgraphs.
_row("If", "has_bodies")
_row("Loop", "has_bodies iterates")
_row("Scan", "has_bodies iterates")
