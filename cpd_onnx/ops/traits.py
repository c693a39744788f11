"""Traits of operators: a table with one row for each operator.

This table is the only place that classifies operators: shape inference, combing, repair, proof, deployment and the
import into torch query it. How channels flow through an operator is defined by its rule (`rules/`), how it is computed
by its evaluator (`ops.evaluate`). An operator without a row has none of the traits, which is the conservative choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from onnx import NodeProto

from cpd_onnx.ir.model import DEFAULT_DOMAINS as DEFAULT_DOMAINS  # for the torch import, which may not import `ir`


@dataclass(frozen=True)
class Traits:
    """Traits of an operator; a trait that is False, None or the default is not known to hold.

    Attributes:
        moves_elements: Each element of the output is an element of an input, possibly cast to another type.
        moved: Input slots from which these elements come: first and end, None for all that follow.
        casts: The output is the first input cast to another element type.
        keeps_zeros: Rearranges or casts a weight so that its zeros remain zeros.
        sums_products: Sums products of the first two inputs, and adds any further inputs.
        annihilates: The output is zero wherever one of the inputs is zero.
        maps_zeros_to_zeros: The output is zero wherever all elements of the first input that it is computed from are,
            and so are new elements unless a number that fills them is given.
        carries_indices: Indices into a table, given as the first input, are still such indices in the output.
        carries_positions: Positions along an axis of an input are still positions along it in the output.
        selects_by_input: An input (index, condition, start) determines which elements are read or written.
        reveals_operand: A change of its only non-constant operand is visible in the output.
        fills_sizes: Creates axes whose sizes are values of an input (shape, repeats, range).
        reads_sizes: Uses the shape of its input, not the values.
        multiplies_sizes: The output is the product of these sizes, not a list of them.
        is_identity: Returns its input unchanged.
        is_view: The output has the elements of the first input in the same order, so that they need not be copied.
        runs_in_place: Elementwise in the first input, which runtimes fuse into what computes it, or overwrite.
        is_local: The output at a place depends on the inputs and parameters at that place alone; axes may be permuted.
        is_sum: Adds two tensors.
        is_linear: A linear function of the first input, alike for all channels that it does not mix.
        is_additive: Adds all inputs, with weights or signs, or joins them.
        is_bilinear: A linear function of each of the first two inputs, alike for all channels that it does not mix.
        is_rectifier: Sets negative elements to zero.
        is_activation: Elementwise activation function, which may saturate and commonly follows a normalisation.
        saturates: Maps a range of inputs to nearly the same output, elementwise or along an axis.
        is_step_function: The float output is a discontinuous function of the input (rounding, remainder, sampling).
        is_boolean: The outputs are boolean.
        compares: Compares two numeric tensors.
        is_equality: Tells which elements of two tensors are equal.
        is_random: The output differs from run to run.
        may_mask: May apply an additive mask of minus infinity to attention scores.
        follows_normalisation: Commonly follows a convolution whose BatchNormalization was folded into it.
        normalises: Divides activations by their own deviation, so that their scale does not depend on the inputs.
        stores_statistics: Stores mean and variance of each channel over the training data, after scale and bias.
        is_quantizer: Converts between real numbers and the integers that represent them.
        rounds_activations: Rounds activations to integers, possibly internally.
        is_quantized: Occurs in quantised models only.
        stays_float: Excluded from int8 quantisation: a high loss of accuracy for little time saved.
        has_integer_kernel: onnxruntime runs it in integers wherever it stands between DequantizeLinear and
            QuantizeLinear, without weights of its own.
        is_constant: The output is stored in the node's attributes.
        has_bodies: Runs subgraphs.
        branches: Runs one of its subgraphs.
        iterates: Runs its subgraph repeatedly.
        scans: Runs its subgraph for each slice of its last inputs.
        data_slot: Input slot of the first data input.
        type_slot: Input slot with the element type of the first output; None for that of `data_slot`.
        shape_slot: Input slot that lists the sizes of the output; None if there is none.
        fill_slot: Input slot of the number that fills new elements; None if there is none.
        training_slot: Input slot whose truth puts the operator into training mode; None if there is none.
        matrix_slots: Input slots of tables that the operator looks up, and of the gates of a recurrent one: matrices of
            weights, where they are constant, that are no operand of a single product.
        integer_outputs: Output slots of 32-bit integers beside outputs of another type.
        output_rank: Rank of the output; None for that of the data input.
        offset: Size of the constant that small values of the output are computed as a difference from, so that they are
            rounded as it is and not as they are; 0 if they are not.
    """

    moves_elements: bool = False
    moved: tuple[int, int | None] = (0, 1)
    casts: bool = False
    keeps_zeros: bool = False
    sums_products: bool = False
    annihilates: bool = False
    maps_zeros_to_zeros: bool = False
    carries_indices: bool = False
    carries_positions: bool = False
    selects_by_input: bool = False
    reveals_operand: bool = False
    fills_sizes: bool = False
    reads_sizes: bool = False
    multiplies_sizes: bool = False
    is_identity: bool = False
    is_view: bool = False
    runs_in_place: bool = False
    is_local: bool = False
    is_sum: bool = False
    is_linear: bool = False
    is_additive: bool = False
    is_bilinear: bool = False
    is_rectifier: bool = False
    is_activation: bool = False
    saturates: bool = False
    is_step_function: bool = False
    is_boolean: bool = False
    compares: bool = False
    is_equality: bool = False
    is_random: bool = False
    may_mask: bool = False
    follows_normalisation: bool = False
    normalises: bool = False
    stores_statistics: bool = False
    is_quantizer: bool = False
    rounds_activations: bool = False
    is_quantized: bool = False
    stays_float: bool = False
    has_integer_kernel: bool = False
    is_constant: bool = False
    has_bodies: bool = False
    branches: bool = False
    iterates: bool = False
    scans: bool = False
    data_slot: int = 0
    type_slot: int | None = None
    shape_slot: int | None = None
    fill_slot: int | None = None
    training_slot: int | None = None
    matrix_slots: tuple[int, ...] = ()
    integer_outputs: tuple[int, ...] = ()
    output_rank: int | None = None
    offset: float = 0.0

    @property
    def joins(self) -> bool:
        """Whether the output consists of elements of all inputs."""
        return self.moves_elements and self.moved == (0, None)

    def carried(self, count: int) -> range:
        """Return the slots, out of `count` inputs of a node, whose elements the output consists of."""
        return range(count)[slice(*self.moved)]


MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""
_TABLE: dict[tuple[str, str], Traits] = {}
"""Traits by (domain, operator)."""
_FAMILY_TRAITS = {
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
"""Traits of all operators whose name starts with the key, in any domain: quantised operators come in open-ended
families."""


def traits_of(node: NodeProto) -> Traits:
    """Return the traits of a node's operator."""
    return traits(node.op_type, node.domain)


@cache
def traits(name: str, domain: str = "") -> Traits:
    """Return the traits of an operator by name and domain."""
    found = _TABLE.get(("" if domain in DEFAULT_DOMAINS else domain, name))
    return _traits_of_row(name, "", {}) if found is None else found


def operators_with(trait: str, domain: str = "") -> frozenset[str]:
    """Return the names of a domain's operators that have a trait."""
    return frozenset(name for (own, name), row in _TABLE.items() if own == domain and getattr(row, trait))


def type_slot(node: NodeProto) -> int:
    """Return the input slot with the element type of a node's first output."""
    row = traits_of(node)
    if row.type_slot is None or (
        node.op_type == "QGemm" and len(node.input) > 7
    ):  # then the output is quantised as well
        return row.data_slot
    return row.type_slot


def _traits_of_row(name: str, words: str, rest: dict[str, float | tuple[int | None, ...]]) -> Traits:
    """Return the traits of a row together with those of the operator's family."""
    words = " ".join([words, *(own for start, own in _FAMILY_TRAITS.items() if name.startswith(start))])
    return Traits(**dict.fromkeys(words.split(), True) | rest)  # type: ignore[arg-type]  # some are no truth values


def _row(name: str, words: str = "", domains: Sequence[str] = ("",), **rest: float | tuple[int | None, ...]) -> None:
    """Add an operator to the table: names of its boolean traits, and values of the others."""
    for domain in domains:
        assert (domain, name) not in _TABLE, f"{domain}::{name} has a row already"
        _TABLE[(domain, name)] = _traits_of_row(name, words, rest)


_MICROSOFT_ONLY, _BOTH_DOMAINS = (MICROSOFT,), ("", MICROSOFT)

# Operators that rearrange elements, create axes from sizes, or read sizes; constants.
_row("BitCast", "reveals_operand is_local")
_row("Cast", "moves_elements casts keeps_zeros carries_indices carries_positions reveals_operand is_local")
_row("CastLike", "casts reveals_operand")
_row("Col2Im", "reveals_operand maps_zeros_to_zeros")
_row("Compress", "selects_by_input")
_row(
    "Concat",
    "is_additive moves_elements keeps_zeros reveals_operand follows_normalisation has_integer_kernel",
    moved=(0, None),
)
_row("Constant", "is_constant")
_row("ConstantOfShape", "fills_sizes", shape_slot=0)
_row("DepthToSpace", "reveals_operand maps_zeros_to_zeros")
_row("Expand", "is_linear moves_elements keeps_zeros carries_indices carries_positions reveals_operand fills_sizes")
_row("Flatten", "is_linear moves_elements keeps_zeros carries_indices reveals_operand is_view")
_row("Gather", "is_linear moves_elements keeps_zeros carries_indices selects_by_input", matrix_slots=(0,))
_row("GatherElements", "carries_indices selects_by_input")
_row("GatherND", "carries_indices selects_by_input")
_row(
    "Identity",
    "is_linear moves_elements keeps_zeros carries_indices carries_positions reveals_operand is_identity is_view "
    "is_local",
)
_row("Pad", "is_linear reveals_operand maps_zeros_to_zeros", _BOTH_DOMAINS, fill_slot=2)
_row("Range", "fills_sizes", _BOTH_DOMAINS)
_row(
    "Reshape",
    "is_linear moves_elements keeps_zeros carries_indices carries_positions reveals_operand is_view",
    shape_slot=1,
)
_row("ScatterElements", "selects_by_input")
_row("TensorScatter", "selects_by_input")
_row("ScatterND", "selects_by_input")
_row("Shape", "reads_sizes")
_row("Size", "reads_sizes multiplies_sizes")
_row("Slice", "is_linear moves_elements keeps_zeros carries_indices carries_positions reveals_operand selects_by_input")
_row("SpaceToDepth", "reveals_operand maps_zeros_to_zeros")
_row("Split", "is_linear moves_elements keeps_zeros carries_indices reveals_operand")
_row("Squeeze", "is_linear moves_elements keeps_zeros carries_indices carries_positions reveals_operand is_view")
_row("Tile", "is_linear moves_elements keeps_zeros carries_indices reveals_operand fills_sizes")
_row("Transpose", "is_linear moves_elements keeps_zeros carries_indices reveals_operand is_local")
_row("Unsqueeze", "is_linear moves_elements keeps_zeros carries_indices carries_positions reveals_operand is_view")
_row(
    "Where",
    "moves_elements selects_by_input may_mask stays_float is_local has_integer_kernel",
    moved=(1, 3),
    type_slot=1,
)

# Arithmetic, comparison, logic.
_row(
    "Add",
    "is_additive carries_positions reveals_operand is_sum may_mask follows_normalisation is_local has_integer_kernel",
)
_row("And", "is_boolean")
_row("ArgMax", "stays_float")
_row("Ceil", "is_step_function is_local")
_row("CumSum", "stays_float")
_row("Div", "is_linear reveals_operand is_local")
_row("Equal", "is_boolean compares is_equality")
_row("Floor", "is_step_function is_local")
_row("Greater", "is_boolean compares")
_row("GreaterOrEqual", "is_boolean compares")
_row("IsInf", "is_boolean")
_row("IsNaN", "is_boolean")
_row("Less", "is_boolean compares")
_row("LessOrEqual", "is_boolean compares")
_row("Max", "may_mask is_local")
_row("Mod", "is_step_function")
_row(
    "Mul", "is_bilinear carries_positions reveals_operand follows_normalisation annihilates is_local has_integer_kernel"
)
_row("Neg", "is_linear reveals_operand is_local")
_row("Not", "is_boolean")
_row("OneHot", "is_step_function")
_row("OptionalHasElement", "is_boolean")
_row("Or", "is_boolean")
_row("RegexFullMatch", "is_boolean")
_row("Round", "is_step_function is_local")
_row("Sign", "is_step_function is_local")
_row("Sub", "is_additive carries_positions reveals_operand may_mask is_local")
_row("Sum", "is_additive may_mask is_local")
_row("TopK", "stays_float")
_row("Unique", "is_step_function stays_float")
_row("Xor", "is_boolean")

# Other elementwise operators.
_row("Abs", "is_local")
_row("Acos", "is_local")
_row("Acosh", "is_local")
_row("Asin", "is_local")
_row("Asinh", "is_local")
_row("Atan", "is_local")
_row("Atanh", "is_local")
_row("Cos", "is_local")
_row("Cosh", "is_local")
_row("Exp", "is_local")
_row("Log", "is_local")
_row("Mean", "is_additive is_local")
_row("Min", "is_local")
_row("Pow", "is_local")
_row("Reciprocal", "is_local")
_row("Sin", "is_local")
_row("Sinh", "is_local")
_row("Sqrt", "is_local")
_row("Tan", "is_local")

# Layers.
_row("BatchNormalization", "stays_float runs_in_place stores_statistics is_local")
_row("Conv", "follows_normalisation sums_products")
_row("AveragePool", "is_linear maps_zeros_to_zeros has_integer_kernel")
_row("ConvTranspose", "sums_products")
_row("DynamicQuantizeLSTM", domains=_MICROSOFT_ONLY, output_rank=4)
_row(
    "EmbedLayerNormalization", domains=_MICROSOFT_ONLY, type_slot=2, output_rank=3, matrix_slots=(2, 3, 4),
    integer_outputs=(1,),
)  # fmt: skip  # a row
_row("GatherBlockQuantized", domains=_MICROSOFT_ONLY, type_slot=2)
_row("GRU", matrix_slots=(1, 2))
_row("Gemm", "sums_products")
_row("GlobalAveragePool", "is_linear maps_zeros_to_zeros has_integer_kernel")
_row("GlobalLpPool", "maps_zeros_to_zeros")
_row("GlobalMaxPool", "maps_zeros_to_zeros")
_row("InstanceNormalization", "stays_float normalises")
_row("LSTM", matrix_slots=(1, 2))
_row("LayerNormalization", "stays_float normalises")
_row("LpPool", "maps_zeros_to_zeros")
_row("MatMul", "is_bilinear sums_products")
_row("MaxPool", "follows_normalisation maps_zeros_to_zeros")
_row("RNN", matrix_slots=(1, 2))

_row("ReduceL1", "maps_zeros_to_zeros")
_row("ReduceL2", "maps_zeros_to_zeros")
_row("ReduceMax", "maps_zeros_to_zeros")
_row("ReduceMean", "is_linear maps_zeros_to_zeros")
_row("ReduceMin", "maps_zeros_to_zeros")
_row("ReduceProd", "maps_zeros_to_zeros")
_row("ReduceSum", "is_linear maps_zeros_to_zeros")
_row("ReduceSumSquare", "maps_zeros_to_zeros")
_row("Resize", "is_linear maps_zeros_to_zeros")
_row("Upsample", "is_linear maps_zeros_to_zeros")

# Losses.
_row("NegativeLogLikelihoodLoss", "selects_by_input")
_row("SoftmaxCrossEntropyLoss", "selects_by_input")

# Activation functions and other saturating operators.
_row("BiasGelu", "is_activation is_local", _MICROSOFT_ONLY)
_row("Celu", "is_activation is_local")
_row("Clip", "is_activation carries_indices is_local")
_row("Elu", "is_activation is_local")
_row("Erf", "saturates is_local")
_row("FastGelu", "is_activation is_local", _MICROSOFT_ONLY)
_row("Gelu", "is_activation is_local", _BOTH_DOMAINS)
_row("HardSigmoid", "is_activation is_local")
_row("HardSwish", "is_activation is_local")
_row("Hardmax", "saturates")
_row("LeakyRelu", "is_activation is_local has_integer_kernel")
_row("LogSoftmax", "saturates")
_row("Mish", "is_activation is_local")
_row("PRelu", "is_activation is_local")
_row("QuickGelu", "is_activation is_local", _MICROSOFT_ONLY)
_row("Relu", "is_activation is_rectifier is_local")
_row("Selu", "is_activation is_local")
_row("Shrink", "saturates is_local")
_row("Sigmoid", "is_activation is_local has_integer_kernel", offset=1.0)
_row("Softmax", "saturates stays_float has_integer_kernel")
_row("Softplus", "is_activation is_local")
_row("Softsign", "is_activation is_local")
_row("Swish", "is_activation is_local")
_row("Tanh", "is_activation is_local")
_row("ThresholdedRelu", "is_activation is_local")

# Randomness.
_row("Bernoulli", "is_random is_step_function")
_row("Dropout", "is_random", training_slot=2)
_row("Multinomial", "is_random")
_row("RandomNormal", "is_random")
_row("RandomNormalLike", "is_random")
_row("RandomUniform", "is_random")
_row("RandomUniformLike", "is_random")

# Quantisation; see also `_FAMILY_TRAITS`.
_row("DequantizeLinear", "is_quantizer keeps_zeros reveals_operand", _BOTH_DOMAINS, type_slot=1)
_row("QAttention", domains=_MICROSOFT_ONLY, type_slot=2)
_row("QEmbedLayerNormalization", domains=_MICROSOFT_ONLY, type_slot=8, output_rank=3, integer_outputs=(1,))
_row("QLinearWhere", "selects_by_input", _MICROSOFT_ONLY, type_slot=1)
_row("MatMulIntegerToFloat", domains=_MICROSOFT_ONLY, type_slot=2)
_row("QGemm", domains=_MICROSOFT_ONLY, type_slot=1)
_row("QLinearConcat", domains=_MICROSOFT_ONLY, data_slot=2)
_row("QuantizeLinear", "is_quantizer keeps_zeros saturates", _BOTH_DOMAINS, type_slot=2)

# Control flow.
_row("If", "has_bodies branches")
_row("Loop", "has_bodies iterates")
_row("Scan", "has_bodies iterates scans")
