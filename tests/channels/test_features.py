"""The last hidden tensors before the outputs, whatever is computed from them afterwards."""

import pytest

from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.features import features_of
from tests.support.models import from_text

IMAGE = "(float[N, 3, 8, 8] x, float[4, 3, 3, 3] w, float[4, 6] v, float[4, 4, 1, 1] u, float[6] k, float[4, 4] m"
BODY = "{ a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Relu (a)"
GRAPHS = {
    "pooled": (f"{IMAGE}) => (float[N, 6] y) {BODY} c = GlobalAveragePool (b) d = Flatten (c) e = MatMul (d, v) y = Add (e, k) }}", ["b"]),
    "probabilities": (f"{IMAGE}) => (float[N, 6] y) {BODY} c = GlobalAveragePool (b) d = Flatten (c) e = MatMul (d, v) y = Softmax (e) }}", ["b"]),
    "reshaped to a size of the input": (
        f"{IMAGE}, int64[1] i, int64[1] j) => (float[N, 6] y) {BODY} c = GlobalAveragePool (b) s = Shape (x) n = Gather (s, i) "
        "t = Concat <axis = 0> (n, j) d = Reshape (c, t) y = MatMul (d, v) }",
        ["b"],
    ),
    "two heads that meet": (
        f"{IMAGE}) => (float[N, 8, 8, 8] y) {BODY} c = Conv (b, u) d = Sigmoid (c) e = Conv (a, u) "
        "y = Concat <axis = 1> (d, e) }",
        ["a", "b"],
    ),
    "two outputs of one tensor": (f"{IMAGE}) => (float[N, 4, 8, 8] y, float[N, 4, 8, 8] z) {BODY} y = Conv (b, u) z = Conv (b, u) }}", ["b"]),
    "a product of activations": (
        "(float[2, 5, 4] x, float[4, 4] m, float[4, 4] n) => (float[2, 5, 5] y) "
        "{ r = Tanh (x) q = MatMul (r, m) k = MatMul (r, n) t = Transpose <perm = [0, 2, 1]> (k) y = MatMul (q, t) }",
        ["r"],
    ),
    "a recurrent layer": (
        "(float[5, 2, 4] x, float[1, 24, 4] w, float[1, 24, 6] r) => (float[5, 1, 2, 6] y) "
        "{ a = Tanh (x) y = LSTM <hidden_size = 6> (a, w, r) }",
        ["a"],
    ),
    "one output without": (f"{IMAGE}) => (float[N, 4, 8, 8] y, float[N, 3, 8, 8] z) {BODY} y = Conv (b, u) z = Relu (x) }}", []),
    "the weights follow the input": ("(float[2, 4] x, float[4, 4] m) => (float[2, 4] y) { y = MatMul (x, m) }", []),
    "no weights": ("(float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }", []),
}  # fmt: skip  # a table


@pytest.mark.parametrize("name", GRAPHS)
def test_features_are_what_the_last_weights_multiply(name: str) -> None:
    text, expected = GRAPHS[name]
    model = from_text(text, values={"i": [0], "j": [4]})
    assert features_of(comb(model)) == expected
