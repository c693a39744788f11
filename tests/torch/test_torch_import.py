"""The torch import computes what onnxruntime computes, and gives every tensor back bit for bit."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

pytest.importorskip("torch")

import torch  # after the check for it

from cpd_onnx.data.sources import inputs_of
from cpd_onnx.errors import ModelError, UnsupportedError
from cpd_onnx.torch import OPERATORS, OnnxModule, import_model, read_weights, unsupported, write_weights
from cpd_onnx.torch.dtypes import to_numpy, to_torch
from cpd_onnx.torch.operators.generate import as_numbers, as_tensor
from cpd_onnx.torch.registry import register
from tests.support.models import from_text

Array = npt.NDArray[Any]

DATA = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")) / "onnx"

MODELS = [
    "cntk_mnist",
    "dicenet_s0.75_city",
    "enet_davidtvs_default_camvid",
    "espnet_p2_q8_camvid",
    "espnet_p2_q8_camvid_bnfold",
    "espnetv2_s0.5_city",
    "fastestdet",
    "person_reid_0248",
    "ppocr_v2_det",
    "pytorch_super_resolution",
    "resnet20_gtsrb",
    "resnet56_cifar10",
    "resnet56_jpeg_cifar10",
    "resnet56_jpeg_cifar10_bnfold",
    "resnet56_vainf_groupsl_dense_cifar10",
    "resnet56_vainf_groupsl_pruned2.55x_cifar10",
    "road_segmentation_adas_0001",
    "tf_bert_tiny_qa",
    "twinlitenet",
    "twinlitenet_qdq_int8",
    "vit_cifar10_smmk47",
    "yolox_nano",
]
PIXELS = {"yolox_nano"}
"""Models whose input are pixels of 0..255; on smaller numbers the activations vanish and round-off shows."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and a busy machine makes them wait for each other."""
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=1)
def imported(name: str) -> tuple[ModelProto, OnnxModule]:
    path = DATA / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    model = onnx.load(path)
    return model, import_model(model).eval()


def session_of(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed_of(model: ModelProto, scale: float = 1.0, batch: int = 2) -> dict[str, Array]:
    """Normal numbers and small integers in the inputs' shapes; free axes get the batch size if first, else 64."""
    generator = np.random.default_rng(0)
    feed = {}
    for entry in inputs_of(model):
        free = (batch, *[64] * 5)
        shape = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(entry.shape or ())]
        values = generator.integers(0, 2, shape) if entry.dtype.kind in "ib" else generator.normal(size=shape) * scale
        feed[entry.name] = np.asarray(values).astype(entry.dtype)
    return feed


def call(module: OnnxModule, feed: dict[str, Array]) -> list[Array]:
    with torch.no_grad():
        return [to_numpy(output) for output in module(*map(to_torch, feed.values()))]


def assert_same(results: list[Array], expected: list[Array], tolerance: float = 1e-4) -> None:
    """Equal shapes and types, and values that differ by less than a share of the largest one."""
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert result.shape == wanted.shape
        a, b = result.astype(np.float64), wanted.astype(np.float64)
        largest = np.abs(b[np.isfinite(b)]).max(initial=1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


# Real models.


@pytest.mark.parametrize("name", MODELS)
def test_model_computes_the_same_as_onnxruntime(name: str) -> None:
    model, module = imported(name)
    feed = feed_of(model, scale=50.0 if name in PIXELS else 1.0)
    assert_same(call(module, feed), session_of(model).run(None, feed))


@pytest.mark.parametrize("name", MODELS)
def test_untouched_model_comes_back_byte_for_byte(name: str) -> None:
    model, module = imported(name)
    state, stored = module.onnx_state(), read_weights(model)
    assert {tensor.name for tensor in model.graph.initializer} <= set(state)
    assert {name: value.tobytes() for name, value in state.items()} == {n: stored[n].tobytes() for n in state}
    assert write_weights(model, state).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_computed_without_tensors(name: str) -> None:
    _, module = imported(name)
    crossings = [node.name for node in module.graph.nodes if node.target is as_numbers]
    assert crossings == []


@pytest.mark.parametrize("name", ["vit_cifar10_smmk47", "resnet20_gtsrb"])
def test_batch_size_stays_free(name: str) -> None:
    model, module = imported(name)
    session = session_of(model)
    for batch in (1, 5):
        feed = feed_of(model, batch=batch)
        assert_same(call(module, feed), session.run(None, feed))


def test_all_weights_of_a_transformer_train() -> None:
    model, module = imported("vit_cifar10_smmk47")
    feed = feed_of(model)
    module(*map(to_torch, feed.values()))[0].square().sum().backward()
    parameters = module.onnx_parameters()
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    module.zero_grad()
    assert without == []
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    assert {tensor.name for tensor in floats if np.prod(tensor.dims) > 1} == set(parameters)


# Operators, by table: ONNX text in, onnxruntime's result out.


def parse(body: str, opset: int = 17) -> ModelProto:
    """Model of `(inputs) => (outputs) <initializers> { nodes }`."""
    quoted = body.replace("'", '"')
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\ng {quoted}')


UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh Ceil Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu
    Log LogSoftmax Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
    ThresholdedRelu GlobalAveragePool GlobalMaxPool Flatten Hardmax
""".split()  # noqa: SIM905  # forty names read best as words
BINARY = "Add Sub Mul Div Pow Max Min Mean Sum".split()  # noqa: SIM905
REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod SumSquare".split()  # noqa: SIM905

BODIES = {
    "conv": "(float[2,4,9,9] x, float[6,4,3,3] w, float[6] b) => (y) { y = Conv<pads=[1,0,2,1],strides=[2,1]>(x,w,b) }",
    "conv same": "(float[2,4,9,8] x, float[6,4,3,3] w) => (y) { y = Conv<auto_pad='SAME_UPPER',strides=[2,2]>(x,w) }",
    "conv lower": "(float[2,4,9,8] x, float[6,4,2,2] w) => (y) { y = Conv<auto_pad='SAME_LOWER'>(x,w) }",
    "conv grouped": "(float[2,4,9] x, float[6,2,3] w) => (y) { y = Conv<group=2,dilations=[2]>(x,w) }",
    "conv 3d": "(float[1,2,5,6,7] x, float[3,2,2,3,3] w) => (y) { y = Conv(x,w) }",
    "conv transposed": "(float[2,4,5,5] x, float[4,3,3,3] w, float[6] b) => (y) {"
    " y = ConvTranspose<strides=[2,2],pads=[1,1,1,1],output_padding=[1,1],group=2>(x,w,b) }",
    "conv transposed lopsided": "(float[2,4,5,5] x, float[4,3,3,3] w, float[3] b) => (y) {"
    " y = ConvTranspose<strides=[2,2],pads=[1,0,2,1]>(x,w,b) }",
    "conv transposed shape": "(float[2,4,5,5] x, float[4,3,3,3] w) => (y) {"
    " y = ConvTranspose<strides=[2,2],output_shape=[10,10]>(x,w) }",
    "gemm": "(float[3,4] a, float[5,4] b, float[5] c) => (y) { y = Gemm<transB=1>(a,b,c) }",
    "gemm scaled": "(float[4,3] a, float[4,5] b, float[3,1] c) => (y) { y = Gemm<transA=1,alpha=0.5,beta=2.0>(a,b,c) }",
    "matmul": "(float[2,3,4] a, float[4,5] b) => (y) { y = MatMul(a,b) }",
    "matmul vector": "(float[4] a, float[2,4,5] b) => (y) { y = MatMul(a,b) }",
    "einsum": "(float[2,3,4] a, float[2,4,5] b) => (y) { y = Einsum<equation='bij, bjk -> bik'>(a,b) }",
    "max pool": "(float[2,3,9,9] x) => (y, i) { y, i = MaxPool<kernel_shape=[3,3],pads=[1,0,1,2],strides=[2,2]>(x) }",
    "max pool ceiled": "(float[2,3,8,8] x) => (y) { y = MaxPool<kernel_shape=[3,3],ceil_mode=1,strides=[2,2]>(x) }",
    "max pool dropped": "(float[2,3,5,5] x) => (y) {"
    " y = MaxPool<kernel_shape=[2,2],pads=[1,1,1,1],ceil_mode=1,strides=[3,3]>(x) }",
    "average pool dropped": "(float[2,3,5,5] x) => (y) {"
    " y = AveragePool<kernel_shape=[2,2],pads=[1,1,1,1],ceil_mode=1,strides=[3,3]>(x) }",
    "average pool": "(float[2,3,9,9] x) => (y) { y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],strides=[2,2]>(x) }",
    "average pool counted": "(float[2,3,9,9] x) => (y) {"
    " y = AveragePool<kernel_shape=[3,3],pads=[0,1,1,2],count_include_pad=1>(x) }",
    "average pool ceiled": "(float[2,3,8,8] x) => (y) {"
    " y = AveragePool<kernel_shape=[3,3],ceil_mode=1,strides=[2,2]>(x) }",
    "lp pool": "(float[2,3,9,9] x) => (y) { y = LpPool<kernel_shape=[3,3],p=3>(x) }",
    "batch norm": "(float[2,3,4] x, float[3] a, float[3] b, float[3] c, float[3] v) => (y) {"
    " w = Abs(v) y = BatchNormalization<epsilon=0.1>(x,a,b,c,w) }",
    "instance norm": "(float[2,3,4,5] x, float[3] a, float[3] b) => (y) { y = InstanceNormalization(x,a,b) }",
    "layer norm": "(float[2,3,4] x, float[3,4] a, float[3,4] b) => (y) { y = LayerNormalization<axis=1>(x,a,b) }",
    "lrn": "(float[2,6,4,4] x) => (y) { y = LRN<size=3,alpha=0.1>(x) }",
    "prelu": "(float[2,3,4] x, float[3,1] a) => (y) { y = PRelu(x,a) }",
    "clip": "(float[2,3] x) => (y) <float low = {-0.5}, float high = {0.5}> { y = Clip(x,low,high) }",
    "where": "(float[2,3] x, float[3] z) => (y) { c = Greater(x,z) y = Where(c,x,z) }",
    "resize nearest": "(float[1,2,4,5] x) => (y) <float[4] s = {1.,1.,2.,3.}> {"
    " y = Resize<coordinate_transformation_mode='asymmetric',nearest_mode='floor'>(x,,s) }",
    "resize linear": "(float[1,2,4,5] x) => (y) <int64[4] s = {1,2,7,9}> { y = Resize<mode='linear'>(x,,,s) }",
    "resize corners": "(float[1,2,4,5] x) => (y) <int64[4] s = {1,2,7,9}> {"
    " y = Resize<mode='linear',coordinate_transformation_mode='align_corners'>(x,,,s) }",
    "resize cubic": "(float[1,2,6,5] x) => (y) <float[4] s = {1.,1.,0.6,1.5}> { y = Resize<mode='cubic'>(x,,s) }",
    "unpool": "(float[1,2,6,6] x) => (y) { p, i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(x)"
    " y = MaxUnpool<kernel_shape=[2,2],strides=[2,2]>(p,i) }",
    "slice": "(float[5,6] x) => (y) <int64[2] a = {4,-2}, int64[2] b = {-99,0}, int64[2] c = {0,1},"
    " int64[2] d = {-2,-1}> { y = Slice(x,a,b,c,d) }",
    "pad reflect": "(float[4,5] x) => (y) <int64[4] p = {1,2,1,3}> { y = Pad<mode='reflect'>(x,p) }",
    "pad edge": "(float[4,5] x) => (y) <int64[4] p = {1,0,1,3}> { y = Pad<mode='edge'>(x,p) }",
    "pad constant": "(float[4,5] x) => (y) <int64[4] p = {1,-1,1,3}, float v = {7}> { y = Pad(x,p,v) }",
    "split": "(float[7,2] x) => (a, b) <int64[2] s = {3,4}> { a, b = Split(x,s) }",
    "gather": "(float[4,5,3] x) => (y) <int64[2,2] i = {0,-1,2,1}> { y = Gather<axis=1>(x,i) }",
    "gather elements": "(float[2,3] x) => (y) <int64[2,2] i = {0,2,-1,1}> { y = GatherElements<axis=1>(x,i) }",
    "gather nd": "(float[2,3,4] x) => (y) <int64[2,2] i = {0,2,1,0}> { y = GatherND(x,i) }",
    "scatter nd": "(float[4,3] x, float[2,3] u) => (y) <int64[2,1] i = {3,0}> {"
    " y = ScatterND<reduction='add'>(x,i,u) }",
    "scatter elements": "(float[3,3] x, float[1,3] u) => (y) <int64[1,3] i = {0,2,-1}> { y = ScatterElements(x,i,u) }",
    "top k": "(float[3,6] x) => (v, i) <int64[1] k = {2}> { v, i = TopK<axis=1,largest=0>(x,k) }",
    "one hot": "(float[3] x) => (y) <int64[1] d = {3}, int64[2,2] i = {0,2,-1,1}, float[2] v = {0.,5.}> {"
    " a = OneHot<axis=1>(i,d,v) s = ReduceSum(x) y = Mul(a,s) }",
    "cum sum": "(float[3,6] x) => (y) <int64 a = {1}> { y = CumSum<exclusive=1,reverse=1>(x,a) }",
    "expand": "(float[3,1] x) => (y) <int64[3] s = {2,1,4}> { y = Expand(x,s) }",
    "tile": "(float[2,3] x) => (y) <int64[2] r = {2,3}> { y = Tile(x,r) }",
    "depth to space": "(float[1,8,2,3] x) => (y) { y = DepthToSpace<blocksize=2,mode='CRD'>(x) }",
    "space to depth": "(float[1,2,4,6] x) => (y) { y = SpaceToDepth<blocksize=2>(x) }",
    "arg max": "(float[3,6] x) => (y) { y = ArgMax<axis=1,keepdims=0>(x) }",
    "trilu": "(float[4,4] x) => (y) <int64 k = {1}> { y = Trilu<upper=0>(x,k) }",
    "grid sample": "(float[1,2,4,4] x, float[1,3,3,2] p) => (y) { y = GridSample<mode='bilinear'>(x,p) }",
    "lstm": "(float[4,2,3] x, float[2,20,3] w, float[2,20,5] r, float[2,40] b) => (y, h, c) {"
    " y, h, c = LSTM<hidden_size=5,direction='bidirectional'>(x,w,r,b) }",
    "gru": "(float[4,2,3] x, float[1,15,3] w, float[1,15,5] r, float[1,30] b) => (y, h) {"
    " y, h = GRU<hidden_size=5,linear_before_reset=1,direction='reverse'>(x,w,r,b) }",
    "gru early": "(float[4,2,3] x, float[1,15,3] w, float[1,15,5] r, float[1,30] b) => (y, h) {"
    " y, h = GRU<hidden_size=5>(x,w,r,b) }",
    "rnn": "(float[4,2,3] x, float[1,5,3] w, float[1,5,5] r) => (y, h) <int32[2] n = {3,4}> {"
    " y, h = RNN<hidden_size=5>(x,w,r,,n) }",
    "quantised": "(float[3,4] x) => (y) <float s = {0.1}, uint8 z = {128}> {"
    " q = QuantizeLinear(x,s,z) y = DequantizeLinear(q,s,z) }",
    "quantised channels": "(float[3,4] x) => (y) <float[4] s = {0.1,0.2,0.3,0.4}, int8[4] z = {0,0,0,0}> {"
    " q = QuantizeLinear<axis=1>(x,s,z) y = DequantizeLinear<axis=1>(q,s,z) }",
    "sequence": "(float[6,4] x) => (y, z) <int64 two = {2}, int64 one = {1}> { s = SplitToSequence(x,two)"
    " y = SequenceAt(s,one) r = SequenceErase(s,one) t = SequenceInsert(r,y) z = ConcatFromSequence<axis=1>(t) }",
    "dropout": "(float[3,4] x) => (y) { y = Dropout(x) }",
    "fused matmul": "(float[3,4] a, float[5,4] b) => (y) { y = com.microsoft.FusedMatMul<transB=1,alpha=0.5>(a,b) }",
    "fused matmul, first axis of A moved": "(float[4,2,3] a, float[2,5,3] b) => (y) {"
    " y = com.microsoft.FusedMatMul<transBatchA=1,transB=1>(a,b) }",
    "fused matmul, first axis of both moved": "(float[3,2,4] a, float[3,2,5] b) => (y) {"
    " y = com.microsoft.FusedMatMul<transBatchA=1,transBatchB=1,transA=1>(a,b) }",
    "fast gelu": "(float[3,4] x, float[4] b) => (y) { y = com.microsoft.FastGelu(x,b) }",
    "skip layer norm": "(float[2,3,4] x, float[2,3,4] s, float[4] a, float[4] b) => (y) {"
    " y = com.microsoft.SkipLayerNormalization(x,s,a,b) }",
    "shape chain": "(float[N,6,4] x) => (y) <int64 zero = {0}, int64[1] first = {0}, int64[1] six = {6}, int64 h = {3},"
    " int64 two = {2}, int64[1] rest = {-1}> { s = Shape(x) c = Gather(s,two) f = Cast<to=1>(c) r = Sqrt(f)"
    " n = Gather(s,zero) u = Unsqueeze(n,first) d = Mul(h,two) e = Unsqueeze(d,first) t = Concat<axis=0>(u,e,rest)"
    " z = Reshape(x,t) y = Div(z,r) }",
    "float sizes": "(float[N,2,10,5] x) => (y) <int64[1] a = {2}, int64[1] b = {4}, int64[1] o = {0}, float k = {0.7}>"
    " { s = Shape(x) hw = Slice(s,a,b) f = Cast<to=1>(hw) m = Mul(f,k) l = Floor(m) i = Cast<to=7>(l)"
    " nc = Slice(s,o,a) t = Concat<axis=0>(nc,i) y = Resize<mode='linear'>(x,,,t) }",
}
MS = "com.microsoft."
QDQ = "<float s = {0.05}, uint8 z = {120}, float t = {0.0213}> { a = QuantizeLinear(x,s,z)"
BODIES |= {
    "gather one": "(float[3,4] x) => (y) <int64 i = {2}> { v = ReduceMax<axes=[1],keepdims=0>(x) y = Gather(v,i) }",
    "gather nd batched": "(float[2,3,4] x) => (y) <int64[2,2,1] i = {0,2,-1,0}> { y = GatherND<batch_dims=1>(x,i) }",
    "fused gemm": "(float[3,4] a, float[5,4] b, float[5] c) => (y) {"
    f" y = {MS}FusedGemm<transB=1,activation='LeakyRelu',activation_alpha=0.2>(a,b,c) }}",
    "transpose matmul": f"(float[4,3] a, float[4,5] b) => (y) {{ y = {MS}TransposeMatMul<transA=1,alpha=0.5>(a,b) }}",
    "quick gelu": f"(float[3,4] x) => (y) {{ y = {MS}QuickGelu<alpha=1.1>(x) }}",
    "bias gelu": f"(float[3,4] x, float[4] b) => (y) {{ y = {MS}BiasGelu(x,b) }}",
    "skip layer norm sum": "(float[2,3,4] x, float[2,3,4] s, float[4] a, float[4] b, float[4] c) => (y, t) {"
    f" y, m, v, t = {MS}SkipLayerNormalization<epsilon=0.01>(x,s,a,b,c) }}",
    "skip rms norm": "(float[2,3,4] x, float[2,3,4] s, float[4] a) => (y, t) {"
    f" y, m, v, t = {MS}SkipSimplifiedLayerNormalization(x,s,a) }}",
    "embed": "(float[9,8] w, float[5,8] p, float[2,8] k, float[8] a, float[8] b) => (y, m, t)"
    " <int32[2,3] i = {0,8,4,1,1,2}, int32[2,3] s = {0,1,1,0,0,1}, int32[2,3] c = {1,1,0,1,0,0}>"
    f" {{ y, m, t = {MS}EmbedLayerNormalization<epsilon=0.01>(i,s,w,p,k,a,b,c) }}",
    "fused attention": "(float[2,3,8] x, float[8,24] w, float[24] b) => (y) <int32[2] m = {3,2}> {"
    f" y = {MS}Attention<num_heads=2>(x,w,b,m) }}",
    "fused attention causal": "(float[2,3,8] x, float[8,24] w, float[24] b, float[2,2,2,2,4] p) => (y, q) {"
    f" y, q = {MS}Attention<num_heads=2,unidirectional=1>(x,w,b,,p) }}",
    "fused attention masked": "(float[2,3,8] x, float[8,20] w, float[20] b, float[1,1,3,3] e) => (y)"
    " <int32[2,3] m = {1,1,0,1,0,1}> {"
    f" y = {MS}Attention<num_heads=2,qkv_hidden_sizes=[8,8,4],scale=0.3>(x,w,b,m,,e) }}",
    "multi head": "(float[2,3,8] q, float[2,5,8] k, float[2,5,8] v, float[24] b, float[2,2,3,5] e) => (y)"
    f" <int32[2] m = {{5,3}}> {{ y = {MS}MultiHeadAttention<num_heads=2>(q,k,v,b,m,e) }}",
    "multi head causal": "(float[2,3,8] q, float[2,3,8] k, float[2,3,8] v) => (y) {"
    f" y = {MS}MultiHeadAttention<num_heads=2,unidirectional=1>(q,k,v) }}",
    "multi head past": "(float[2,3,8] q, float[2,3,8] k, float[2,3,8] v, float[2,2,4,4] c, float[2,2,4,4] d)"
    f" => (y, n, o) {{ y, n, o = {MS}MultiHeadAttention<num_heads=2>(q,k,v,,,,c,d) }}",
    "grouped query": "(float[2,3,64] q, float[2,3,32] k, float[2,3,32] v, float[8,8] c, float[8,8] d) => (y, n, o)"
    " <int32[2] l = {2,2}, int32 t = {3}> { y, n, o ="
    f" {MS}GroupQueryAttention<num_heads=4,kv_num_heads=2,do_rotary=1,softcap=5.0>(q,k,v,,,l,t,c,d) }}",
    "grouped query window": "(float[2,5,32] q, float[2,5,16] k, float[2,5,16] v) => (y, n, o)"
    " <int32[2] l = {4,4}, int32 t = {5}> { y, n, o ="
    f" {MS}GroupQueryAttention<num_heads=4,kv_num_heads=2,local_window_size=2,scale=0.4>(q,k,v,,,l,t) }}",
    "fused rotary": "(float[2,3,8] x, float[7,2] c, float[7,2] d) => (y) <int64[2,3] p = {0,1,2,4,5,6}> {"
    f" y = {MS}RotaryEmbedding<num_heads=2>(x,p,c,d) }}",
    "fused rotary interleaved": "(float[2,2,3,4] x, float[7,2] c, float[7,2] d) => (y) <int64[1] p = {2}> {"
    f" y = {MS}RotaryEmbedding<interleaved=1>(x,p,c,d) }}",
    "qlinear add": f"(float[3,4] x) => (y) {QDQ} q = {MS}QLinearAdd(a,s,z,a,s,z,t,z) y = DequantizeLinear(q,t,z) }}",
    "qlinear mul": f"(float[3,4] x) => (y) {QDQ} q = {MS}QLinearMul(a,s,z,a,s,z,t,z) y = DequantizeLinear(q,t,z) }}",
    "qlinear concat": "(float[3,4] x) => (y)"
    f" {QDQ} q = {MS}QLinearConcat<axis=1>(t,z,a,s,z,a,s,z) y = DequantizeLinear(q,t,z) }}",
    "qlinear pool": "(float[2,3,4,4] x) => (y)"
    f" {QDQ} q = {MS}QLinearGlobalAveragePool(a,s,z,t,z) y = DequantizeLinear(q,t,z) }}",
    "qlinear average pool": "(float[2,3,5,5] x) => (y)"
    f" {QDQ} q = {MS}QLinearAveragePool<kernel_shape=[2,2],strides=[2,2],pads=[1,0,0,1],count_include_pad=1>(a,s,z,t,z)"
    " y = DequantizeLinear(q,t,z) }",
    "qlinear leaky relu": "(float[3,4] x) => (y)"
    f" {QDQ} q = {MS}QLinearLeakyRelu<alpha=0.3>(a,s,z,t,z) y = DequantizeLinear(q,t,z) }}",
    "qlinear sigmoid": f"(float[3,4] x) => (y) {QDQ} q = {MS}QLinearSigmoid(a,s,z,t,z) y = DequantizeLinear(q,t,z) }}",
    "qgemm": "(float[3,4] x, float[5,4] w) => (y, v) <float s = {0.05}, uint8 z = {120}, float t = {0.02},"
    " int8 o = {3}, float u = {0.3}, int32[5] c = {9,-8,700,1,0}> { a = QuantizeLinear(x,s,z) b = QuantizeLinear(w,t,o)"
    f" y = {MS}QGemm<transB=1>(a,s,z,b,t,o,c) q = {MS}QGemm<transB=1,alpha=0.5>(a,s,z,b,t,o,c,u,z)"
    " v = DequantizeLinear(q,u,z) }",
    "integer product": "(float[3,4] x, float[4,5] w, float[5] e) => (y) <float s = {0.05}, uint8 z = {120},"
    " float t = {0.02}, int8 o = {3}> { a = QuantizeLinear(x,s,z) b = QuantizeLinear(w,t,o)"
    f" y = {MS}MatMulIntegerToFloat(a,b,s,t,z,o,e) }}",
    "dynamic product": "(float[3,4] x, float[4,5] w, float[5] e) => (y) <float t = {0.02}, int8 o = {3}> {"
    f" b = QuantizeLinear(w,t,o) y = {MS}DynamicQuantizeMatMul(x,b,t,o,e) }}",
    "four bits": "(float[3,32] x) => (y) <uint8[2,2,8] w = {18,52,86,120,154,188,222,255,1,35,69,103,137,171,205,239,"
    "16,50,84,118,152,186,220,254,3,37,71,105,139,173,207,241}, float[4] s = {0.1,0.2,0.3,0.4}, uint8[2] z = {135,104}>"
    f" {{ a = {MS}MatMulNBits<K=32,N=2,bits=4,block_size=16>(x,w,s)"
    f" b = {MS}MatMulNBits<K=32,N=2,bits=4,block_size=16>(x,w,s,z) y = Add(a,b) }}",
    "rows of four bits": "(float[2,16] x) => (y) <uint8[3,8] w = {18,52,86,120,154,188,222,255,1,35,69,103,137,171,205,"
    "239,16,50,84,118,152,186,220,254}, float[3,1] s = {0.1,0.2,0.3}, uint8[3,1] z = {7,8,4}, int64[2] i = {2,0}> {"
    f" a = {MS}GatherBlockQuantized<bits=4,block_size=16,gather_axis=0,quantize_axis=1>(w,i,s)"
    f" b = {MS}GatherBlockQuantized<bits=4,block_size=16,gather_axis=0,quantize_axis=1>(w,i,s,z)"
    " c = Add(a,b) y = Add(c,x) }",
    "other domain": "(float[3,4] x) => (y) <float s = {0.05}, uint8 z = {120}> {"
    f" q = {MS}QuantizeLinear(x,s,z) y = {MS}DequantizeLinear(q,s,z) }}",
}
BODIES |= {
    "inverse": f"(float[2,3,3] x) => (y) {{ y = {MS}Inverse(x) }}",
    "unfold": f"(float[2,7,3] x) => (y) {{ y = {MS}UnfoldTensor<dim=1,size=3,step=2>(x) }}",
    "expand dims": f"(float[2,3] x) => (y) <int32 a = {{-1}}> {{ y = {MS}ExpandDims(x,a) }}",
    "euclidean distances": f"(float[3,4] a, float[5,4] b) => (y) {{ y = {MS}CDist<metric='euclidean'>(a,b) }}",
    "squared distances": f"(float[3,4] a, float[5,4] b) => (y) {{ y = {MS}CDist(a,b) }}",
    "conv transpose with pads": "(float[1,3,5,5] x, float[3,2,3,3] w, float[2] b) => (y) <int64[4] p = {1,0,1,1}> {"
    f" y = {MS}ConvTransposeWithDynamicPads<strides=[2,2]>(x,w,p,b) }}",
    "scaled silu": f"(float[2,3] x, float s) => (y) {{ a = {MS}ScaledSiLU<alpha=0.7>(x) y = {MS}ScaledSiLU(a,s) }}",
    "gated add": f"(float[2,3,4] x, float[2,3,4] z, float[2,3,1] g) => (y) {{ y = {MS}GatedAdd(x,z,g) }}",
    "gated rms norm": "(float[2,3,8] x, float[4] s, float[2,3,8] g) => (y) {"
    f" a = {MS}GatedRMSNorm<activation='sigmoid'>(x,s,g) y = {MS}GatedRMSNorm(a,s,g) }}",
    "experts": "(float[2,3,4] x, float[6,5] r, float[5,7,4] w, float[5,7] b, float[5,4,7] v, float[5,4] c) => (y) {"
    f" y = {MS}MoE<k=2,activation_type='gelu'>(x,r,w,b,v,c) }}",
    "experts with gates": "(float[6,4] x, float[6,5] r, float[5,6,4] w, float[5,4,3] v) => (y) {"
    f" y = {MS}MoE<k=3,activation_type='swiglu',swiglu_fusion=1,normalize_routing_weights=1,activation_alpha=1.7,"
    "activation_beta=1.0,swiglu_limit=0.5>(x,r,w,,v) }",
    "causal conv": "(float[2,3,8] x, float[3,1,4] w, float[3] b) => (y, s) {"
    f" y, s = {MS}CausalConvWithState<activation='silu',dilation=2>(x,w,b) }}",
    "causal conv with a state": "(float[2,8,3] x, float[3,1,4] w, float[2,3,3] p) => (y, s) {"
    f" y, s = {MS}CausalConvWithState<channels_last=1>(x,w,,p) }}",
    "linear attention": "(float[2,5,12] q, float[2,5,6] k, float[2,5,8] v, float[2,2,3,4] p, float[2,5,2] d,"
    " float[2,5,2] b) => (y, s) { e = Abs(d) f = Neg(e) g = Sigmoid(b) "
    f" y, s = {MS}LinearAttention<q_num_heads=4,kv_num_heads=2>(q,k,v,p,f,g) }}",
    "linear attention without decay": "(float[2,5,12] q, float[2,5,12] k, float[2,5,8] v) => (y, s) {"
    f" y, s = {MS}LinearAttention<q_num_heads=4,kv_num_heads=4,update_rule='linear',scale=0.3>(q,k,v) }}",
    "gates of linear attention": "(float[2,3,4] a, float[4] c, float[4] d, float[2,3,4] b) => (y, z) {"
    f" y, z = {MS}LinearAttentionGate(a,c,d,b) }}",
    "gather nd of onnxruntime": f"(float[2,3,4] x) => (y) <int64[2,2] i = {{0,2,1,0}}> {{ y = {MS}GatherND(x,i) }}",
    "trilu of onnxruntime": f"(float[4,4] x) => (y) <int64 k = {{1}}> {{ y = {MS}Trilu<upper=0>(x,k) }}",
    "pad of onnxruntime": f"(float[2,3] x) => (y) <int64[4] p = {{1,0,0,2}}, float v = {{2.0}}> {{ y = {MS}Pad(x,p,v) }}",
    "grid sample of onnxruntime": f"(float[1,2,4,4] x, float[1,3,3,2] p) => (y) {{ y = {MS}GridSample(x,p) }}",
    "qlinear where": "(float[3,4] x) => (y) <float s = {0.05}, uint8 z = {120}, float t = {0.0213}, bool[3,1] c = {1,0,1}>"
    f" {{ a = QuantizeLinear(x,s,z) q = {MS}QLinearWhere(c,a,s,z,a,t,z,t,z) y = DequantizeLinear(q,t,z) }}",
    "pool with channels last": f"(float[2,5,5,3] x) => (y) {QDQ}"
    f" q = {MS}NhwcMaxPool<kernel_shape=[2,2],strides=[2,2]>(a) y = DequantizeLinear(q,s,z) }}",
    "qlinear average pool with channels last": f"(float[2,5,5,3] x) => (y) {QDQ}"
    f" q = {MS}QLinearAveragePool<channels_last=1,kernel_shape=[2,2],strides=[2,2]>(a,s,z,t,z)"
    " y = DequantizeLinear(q,t,z) }",
    "qlinear conv with channels last": "(float[2,5,5,3] x, float[4,3,2,2] w) => (y) <float s = {0.05}, uint8 z = {120},"
    " float t = {0.0213}> { a = QuantizeLinear(x,s,z) b = QuantizeLinear(w,t,z)"
    f" q = {MS}QLinearConv<channels_last=1>(a,s,z,b,t,z,s,z) y = DequantizeLinear(q,s,z) }}",
    "quantised attention": "(float[2,3,8] x, float[8,24] w, float[24] b) => (y) <float s = {0.05}, uint8 z = {120},"
    " float t = {0.0213}, uint8 o = {128}, int32[2] m = {3,2}> { a = QuantizeLinear(x,s,z) q = QuantizeLinear(w,t,o)"
    f" y = {MS}QAttention<num_heads=2>(a,q,b,s,t,m,z,o) }}",
    "quantised embeddings": "(float[9,8] w, float[5,8] p, float[2,8] k, float[8] a, float[8] b) => (y, m)"
    " <int32[2,3] i = {0,8,4,1,1,2}, int32[2,3] j = {0,1,1,0,0,1}, int32[2,3] c = {1,1,0,1,0,0}, float s = {0.05},"
    " uint8 z = {120}> { d = QuantizeLinear(w,s,z) e = QuantizeLinear(p,s,z) f = QuantizeLinear(k,s,z)"
    " g = QuantizeLinear(a,s,z) h = QuantizeLinear(b,s,z)"
    f" y, m = {MS}QEmbedLayerNormalization<epsilon=0.01>(i,j,d,e,f,g,h,c,s,s,s,s,s,z,z,z,z,z) }}",
}
BODIES |= {name.lower(): f"(float[2,3,4] x) => (y) {{ y = {name}(x) }}" for name in UNARY}
BODIES["mod"] = "(float[2,3] x, float[3] z) => (y) { y = Mod<fmod=1>(x,z) }"
BODIES |= {name.lower(): f"(float[2,3,4] x, float[3,1] z) => (y) {{ a = Abs(x) y = {name}(a,z) }}" for name in BINARY}
BODIES |= {
    f"reduce {name.lower()}": f"(float[2,3,4] x) => (y) {{ a = Abs(x) y = Reduce{name}<axes=[0,2],keepdims=0>(a) }}"
    for name in REDUCTIONS
}


@pytest.mark.parametrize("name", BODIES)
def test_operator_computes_the_same_as_onnxruntime(name: str) -> None:
    model = parse(BODIES[name])
    feed = feed_of(model, batch=3)
    assert_same(call(import_model(model), feed), session_of(model).run(None, feed), 1e-5)


OTHER_OPSETS = {
    "attention causal": (
        "(float[2,4,3,8] q, float[2,2,5,8] k, float[2,2,5,6] v) => (y) { y = Attention<is_causal=1>(q,k,v) }",
        23,
    ),
    "attention packed": (
        "(float[2,3,8] q, float[2,5,8] k, float[2,5,8] v, float[3,5] m) => (y) {"
        " y = Attention<q_num_heads=2,kv_num_heads=2,softcap=2.0>(q,k,v,m) }",
        23,
    ),
    "rms norm": ("(float[2,3,4] x, float[4] s) => (y) { y = RMSNormalization(x,s) }", 23),
    "rotary": ("(float[2,3,5,4] x, float[2,5,2] c, float[2,5,2] s) => (y) { y = RotaryEmbedding(x,c,s) }", 23),
    "group norm": (
        "(float[2,6,4] x, float[6] s, float[6] b) => (y) { y = GroupNormalization<num_groups=3>(x,s,b) }",
        21,
    ),
    "gelu": ("(float[2,3] x) => (y) { y = Gelu<approximate='tanh'>(x) }", 20),
    "mish": ("(float[2,3] x) => (y) { y = Mish(x) }", 18),
    "reduce 18": ("(float[2,3,4] x) => (y) <int64[1] a = {1}> { y = ReduceMax(x,a) }", 18),
    "resize antialiased": (
        "(float[1,2,9,9] x) => (y) <int64[4] s = {1,2,4,5}> { y = Resize<mode='linear',antialias=1>(x,,,s) }",
        18,
    ),
    "softmax 11": ("(float[2,3,4] x) => (y) { y = Softmax<axis=1>(x) }", 11),
    "add 6": ("(float[2,3,4] x, float[3] z) => (y) { y = Add<axis=1,broadcast=1>(x,z) }", 6),
    "prelu 6": ("(float[2,3,4] x, float[3] z) => (y) { y = PRelu(x,z) }", 6),
    "clip 6": ("(float[2,3] x) => (y) { y = Clip<min=-0.5,max=0.5>(x) }", 6),
    "slice 9": ("(float[5,6] x) => (y) { y = Slice<axes=[1],starts=[1],ends=[-1]>(x) }", 9),
    "pad 10": ("(float[4,5] x) => (y) { y = Pad<pads=[1,0,0,2],value=3.0>(x) }", 10),
    "unsqueeze 11": ("(float[4,5] x) => (y) { y = Unsqueeze<axes=[0,-1]>(x) }", 11),
    "upsample 9": ("(float[1,2,3,3] x) => (y) <float[4] s = {1.,1.,2.,2.}> { y = Upsample<mode='linear'>(x,s) }", 9),
    "dropout 10": ("(float[2,3] x) => (y) { y = Dropout<ratio=0.3>(x) }", 10),
}


BEFORE_7 = {
    "add 6": lambda feed: [feed["x"] + feed["z"][:, None]],
    "prelu 6": lambda feed: [np.where(feed["x"] < 0, feed["x"] * feed["z"][:, None], feed["x"])],
    "clip 6": lambda feed: [feed["x"].clip(-0.5, 0.5)],
}
"""What onnxruntime does not run, with the result."""


@pytest.mark.parametrize("name", OTHER_OPSETS)
def test_operator_means_what_its_opset_says(name: str) -> None:
    model = parse(*OTHER_OPSETS[name])
    feed = feed_of(model)
    expected = BEFORE_7[name](feed) if name in BEFORE_7 else session_of(model).run(None, feed)
    assert_same(call(import_model(model), feed), expected, 1e-5)


def test_operator_without_function_of_ours_is_expanded_by_the_standards() -> None:
    model = parse("(float[2,3,4] x) => (y) { y = MeanVarianceNormalization<axes=[0,2]>(x) }")
    feed = feed_of(model)
    expected = call(import_model(model), feed)
    kept = OPERATORS.pop(("", "MeanVarianceNormalization"))
    try:
        assert_same(call(import_model(model), feed), expected, 1e-5)
    finally:
        OPERATORS["", "MeanVarianceNormalization"] = kept


def test_model_functions_are_inlined() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2,3] x) => (float[2,3] y) { y = local.twice(x) }
        <domain: "local", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a,a) }
    """)
    feed = feed_of(model)
    assert_same(call(import_model(model), feed), [2 * feed["x"]])


# Control flow.

FLOW = {
    "if": """(float[3] x, bool c) => (y) <float[3] w = {1,2,3}> { s = Mul(x,w) y = If(c) <
        then_branch = a () => (float[3] p) { p = Add(s,x) },
        else_branch = b () => (float[3] q) { h = Constant<value = float {2}>() q = Mul(x,h) }> }""",
    "if known": """(float[1,3] x) => (y) <int64 zero = {0}, int64 one = {1}> { n = Shape(x) f = Gather(n,zero)
        c = Equal(zero,one) y = If(c) <
        then_branch = a () => (float[1,3] p) { p = Neg(x) },
        else_branch = b () => (float[1,3] q) { q = Exp(x) }> }""",
    "loop": """(float[3] x) => (y, s) <int64 n = {4}, bool yes = {1}, float[3] w = {1,2,3}> { y, s = Loop(n,yes,x) <
        body = b (int64 i, bool c, float[3] v) => (bool d, float[3] u, float[3] o) {
            d = Identity(c) f = Cast<to=1>(i) m = Mul(v,w) u = Add(m,f) o = Neg(u) }> }""",
    "scan": """(float[2] x, float[4,2] z) => (y, s) { y, s = Scan<num_scan_inputs=1, scan_output_directions=[1],
        body = b (float[2] a, float[2] e) => (float[2] u, float[2] o) { u = Add(a,e) o = Mul(u,e) }>(x,z) }""",
}


@pytest.mark.parametrize("name", FLOW)
def test_control_flow_computes_the_same_as_onnxruntime(name: str) -> None:
    model = parse(FLOW[name])
    module = import_model(model)
    feed = feed_of(model)
    assert_same(call(module, feed), session_of(model).run(None, feed), 1e-5)
    if "c" in feed:
        feed["c"] = np.asarray(not feed["c"])
        assert_same(call(module, feed), session_of(model).run(None, feed), 1e-5)


def test_branch_that_is_known_is_imported_in_place() -> None:
    assert not list(import_model(parse(FLOW["if known"])).children())


def test_gradient_flows_into_a_body() -> None:
    module = import_model(parse(FLOW["if"]))
    module(torch.ones(3), torch.tensor(True))[0].sum().backward()
    gradient = module.onnx_parameters()["w"].grad
    assert gradient is not None
    assert gradient.tolist() == [1.0, 1.0, 1.0]


def test_tensors_of_bodies_train_and_are_written_back() -> None:
    model = parse("""(float[3] x, bool c) => (y) { y = If(c) <
        then_branch = a () => (float[3] p) <float[3] w = {1,2,3}> { p = Mul(x,w) },
        else_branch = b () => (float[3] q) { v = Constant<value = float[3] {4,5,6}>() z = If(c) <
            then_branch = d () => (float[3] s) { s = Neg(v) },
            else_branch = e () => (float[3] t) <float[3] u = {7,8,9}> { t = Mul(u,v) }> q = Add(x,z) }> }""")
    module = import_model(model)
    assert set(module.onnx_parameters()) == {"w", "v", "u"}
    assert write_weights(model, module.onnx_state()) == model
    x = np.ones(3, np.float32)
    for choice, reached in ((True, {"w"}), (False, {"u", "v"})):
        feed = {"x": x, "c": np.asarray(choice)}
        module.zero_grad()
        module(*map(to_torch, feed.values()))[0].sum().backward()
        gradients = {name: p.grad for name, p in module.onnx_parameters().items() if p.grad is not None}
        assert set(gradients) == reached
        with torch.no_grad():
            for name in reached:
                module.onnx_parameters()[name].mul_(2.0)
        written = write_weights(model, module.onnx_state())
        assert_same(call(module, feed), session_of(written).run(None, feed), 1e-6)


def test_tensors_of_bodies_with_the_same_name_stay_apart() -> None:
    model = parse("""(float[3] x, bool c) => (y) { y = If(c) <
        then_branch = a () => (float[3] p) <float[3] w = {1,2,3}> { p = Mul(x,w) },
        else_branch = b () => (float[3] q) <float[3] w = {4,5,6}> { q = Mul(x,w) }> }""")
    module = import_model(model)
    assert module.onnx_parameters() == {}
    for choice in (True, False):
        feed = {"x": np.ones(3, np.float32), "c": np.asarray(choice)}
        assert_same(call(module, feed), session_of(model).run(None, feed), 1e-6)


# Quantised models.

QDQ_LAYER = """(float[2,3] x) => (y) <float s = {0.05}, uint8 z = {120}, int8[4,3] w = {9,-9,100,-128,127,3,0,1,2,50,60,70},
    float[4] t = {0.01,0.02,0.03,0.04}, int8[4] o = {0,0,0,0}, int32[4] b = {100,-200,3000,4}, float[4] u = {0.0005,
    0.001,0.0015,0.002}> { q = QuantizeLinear(x,s,z) d = DequantizeLinear(q,s,z) v = DequantizeLinear<axis=0>(w,t,o)
    c = DequantizeLinear<axis=0>(b,u) y = Gemm<transB=1>(d,v,c) }"""


def test_quantised_weights_train_and_come_back_as_integers() -> None:
    model = parse(QDQ_LAYER)
    module = import_model(model)
    assert set(module.onnx_parameters()) == {"w", "b"}
    assert write_weights(model, module.onnx_state()) == model
    feed = feed_of(model)
    assert_same(call(module, feed), session_of(model).run(None, feed), 1e-6)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    module(*map(to_torch, feed.values()))[0].square().sum().backward()
    optimiser.step()
    state = module.onnx_state()
    assert [state[name].dtype for name in "wb"] == [np.int8, np.int32]
    written = write_weights(model, state)
    assert written != model
    assert_same(call(module, feed), session_of(written).run(None, feed), 1e-6)
    other = import_model(model)
    other.load_onnx_state(state)
    assert all(np.array_equal(value, state[name]) for name, value in other.onnx_state().items())


def test_gradients_pass_through_rounding_but_not_beyond_the_range() -> None:
    module = import_model(parse(QDQ_LAYER))
    x = torch.tensor([[0.31, -0.2, 0.0], [100.0, -100.0, 1.0]], requires_grad=True)
    module(x)[0][:, 3].sum().backward()
    expected = torch.tensor([50.0, 60.0, 70.0]) * 0.04
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.stack([expected, expected * torch.tensor([0.0, 0.0, 1.0])]))


def test_integers_that_something_else_uses_too_do_not_train() -> None:
    model = parse(QDQ_LAYER.replace("=> (y)", "=> (y, k)").replace("y = Gemm", "k = Identity(w) y = Gemm"))
    assert set(import_model(model).onnx_parameters()) == {"b"}


def test_integers_whose_floats_say_others_do_not_train() -> None:
    model = parse(QDQ_LAYER.replace("int32[4] b = {100,-200,3000,4}", "int32[4] b = {100,-200,2147483647,4}"))
    assert set(import_model(model).onnx_parameters()) == {"w"}
    model = parse(QDQ_LAYER.replace("float[4] t = {0.01,", "float[4] t = {0.0,"))
    assert set(import_model(model).onnx_parameters()) == {"b"}


def test_loop_without_rounds_gives_the_state_back() -> None:
    module = import_model(parse(FLOW["loop"].replace("int64 n = {4}", "int64 n = {0}")))
    state, stacked = module(torch.ones(3))
    assert state.tolist() == [1.0, 1.0, 1.0]
    assert stacked.numel() == 0


# Gradients.


def _double(*shape: int, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    values = torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=torch.Generator().manual_seed(7))
    return values.requires_grad_()


GRADIENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "Conv": ((_double(1, 2, 5, 5), _double(3, 2, 3, 3), _double(3)), {"pads": (1, 0, 2, 1), "strides": (2, 1)}),
    "ConvTranspose": ((_double(1, 2, 3, 3), _double(2, 2, 3, 3)), {"strides": (2, 2), "pads": (1, 0, 1, 1)}),
    "Gemm": ((_double(3, 2), _double(4, 2), _double(4)), {"transB": 1, "alpha": 0.5}),
    "LayerNormalization": ((_double(2, 3, 4), _double(4), _double(4)), {"outputs": 1}),
    "RMSNormalization": ((_double(2, 3, 4), _double(4)), {}),
    "InstanceNormalization": ((_double(2, 3, 4), _double(3), _double(3)), {}),
    "GroupNormalization": ((_double(2, 4, 3), _double(4), _double(4)), {"num_groups": 2}),
    "PRelu": ((_double(2, 3), _double(3)), {"opset": 17}),
    "AveragePool": ((_double(1, 2, 5, 5),), {"kernel_shape": (3, 3), "pads": (1, 0, 1, 2), "ceil_mode": 1}),
    "LpPool": ((_double(1, 2, 5, 5, low=0.5),), {"kernel_shape": (2, 2), "p": 3}),
    "LpNormalization": ((_double(3, 4, low=0.5),), {}),
    "Attention": ((_double(1, 2, 3, 4), _double(1, 2, 3, 4), _double(1, 2, 3, 4)), {"outputs": 1, "is_causal": 1}),
    "LSTM": ((_double(3, 2, 2), _double(1, 12, 2), _double(1, 12, 3)), {"outputs": 1, "hidden_size": 3}),
    "GRU": ((_double(3, 2, 2), _double(1, 9, 2), _double(1, 9, 3)), {"outputs": 1, "hidden_size": 3}),
    "Resize": ((_double(1, 1, 4, 4), None, (1.0, 1.0, 1.5, 0.6)), {"opset": 18, "mode": "cubic"}),
    "Gelu": ((_double(3, 4),), {"approximate": "tanh"}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_is_right(name: str) -> None:
    inputs, attributes = GRADIENTS[name]
    function = OPERATORS["", name].function

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        result = function(*tensors, **attributes)
        first: torch.Tensor = result[0] if isinstance(result, (list, tuple)) else result
        return first

    assert torch.autograd.gradcheck(run, inputs)


# What becomes of tensors.


def _tensor_model(dtype: int, values: Array) -> ModelProto:
    node = helper.make_node("Mul", ["x", "layer.0/weight:0"], ["y"])
    info = [helper.make_tensor_value_info(name, dtype, ["N", 3]) for name in "xy"]
    graph = helper.make_graph([node], "g", info[:1], info[1:], [numpy_helper.from_array(values, "layer.0/weight:0")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("onnx_type", "dtype"),
    [
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.FLOAT, np.float32),
    ],
)
def test_type_and_bits_of_a_tensor_are_kept(onnx_type: int, dtype: Any) -> None:
    values = np.array([0.1, -0.0, 3.0]).astype(dtype)
    module = import_model(_tensor_model(onnx_type, values))
    state = module.onnx_state()
    assert list(state) == ["layer.0/weight:0"]
    assert state["layer.0/weight:0"].dtype == values.dtype
    assert state["layer.0/weight:0"].tobytes() == values.tobytes()
    assert isinstance(module.onnx_parameters()["layer.0/weight:0"], torch.nn.Parameter)


def test_module_is_called_by_order_or_by_name() -> None:
    module = import_model(parse("(float[2] lambda, float[2] b) => (y, z) { y = Sub(lambda,b) z = Neg(b) }"))
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])
    by_order, by_name = module(a, b), module(b=b, tlambda=a)
    assert [output.tolist() for output in by_order] == [[2.0, 3.0], [-1.0, -1.0]]
    assert [output.tolist() for output in by_name] == [output.tolist() for output in by_order]


def test_names_that_read_alike_stay_apart() -> None:
    model = parse("(float[2] x) => (y) <float[2] a_b = {1,2}, float[2] c = {3,4}> { u = Mul(x,a_b) y = Add(u,c) }")
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "a.b"
    model.graph.initializer[1].name = model.graph.node[1].input[1] = "a_b"
    module = import_model(model)
    assert {name: value.tolist() for name, value in module.onnx_state().items()} == {"a.b": [1, 2], "a_b": [3, 4]}
    assert module(torch.ones(2))[0].tolist() == [4.0, 6.0]


def test_shared_tensor_is_one_parameter() -> None:
    model = parse("(float[2] x) => (y) <float[2] w = {1,2}> { v = Identity(w) u = Mul(x,w) y = Add(u,v) }")
    module = import_model(model)
    assert len(list(module.parameters())) == 1
    module(torch.tensor([3.0, 5.0]))[0].sum().backward()
    gradient = next(module.parameters()).grad
    assert gradient is not None
    assert gradient.tolist() == [4.0, 6.0]


def test_only_weights_train() -> None:
    model = parse("""(float[2,3] x) => (y) <float[3,3] w = {1,2,3,4,5,6,7,8,9}, float[3] mask = {0,0,-1000000},
        float scale = {0.5}, float[3] mean = {0,0,0}, float[3] var = {1,1,1}, float[3] one = {1,1,1},
        float[1] slope = {0.1}> { a = MatMul(x,w) b = Mul(a,scale) c = Add(b,mask)
        d = BatchNormalization(c,one,one,mean,var) y = PRelu(d,slope) }""")
    assert sorted(import_model(model).onnx_parameters()) == ["one", "slope", "w"]


def test_tensor_that_is_a_statistic_too_does_not_train() -> None:
    model = parse("""(float[2,3,2] x) => (y) <float[3,3,1] w = {1,2,3,4,5,6,7,8,9}, float[3] zero = {0,0,0},
        float[3] one = {1,1,1}> { c = Conv(x,w,zero) y = BatchNormalization(c,one,zero,zero,one) }""")
    assert sorted(import_model(model).onnx_parameters()) == ["w"]


def test_constant_nodes_hold_weights_too() -> None:
    model = parse("(float[1,2] x) => (y) { w = Constant<value = float[2,2] {1,2,3,4}>() y = MatMul(x,w) }")
    module = import_model(model)
    with torch.no_grad():
        module.onnx_parameters()["w"].mul_(2)
    changed = write_weights(model, module.onnx_state())
    feed = {"x": np.ones((1, 2), np.float32)}
    assert session_of(changed).run(None, feed)[0].tolist() == [[8.0, 12.0]]
    assert session_of(model).run(None, feed)[0].tolist() == [[4.0, 6.0]]


def test_state_is_loaded_by_onnx_name() -> None:
    module = import_model(_tensor_model(TensorProto.FLOAT, np.ones(3, np.float32)))
    module.load_onnx_state({"layer.0/weight:0": np.array([1, 2, 3], np.float32)})
    assert module(torch.ones(1, 3))[0].tolist() == [[1.0, 2.0, 3.0]]
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        module.load_onnx_state({"nothing": np.ones(3, np.float32)})
    with pytest.raises(ModelError, match="shape"):
        module.load_onnx_state({"layer.0/weight:0": np.ones(4, np.float32)})


def test_tensor_of_another_shape_is_not_written() -> None:
    model = _tensor_model(TensorProto.FLOAT, np.ones(3, np.float32))
    with pytest.raises(ModelError, match=r"float32\[3\] in the model but float32\[4\]"):
        write_weights(model, {"layer.0/weight:0": np.ones(4, np.float32)})
    with pytest.raises(ModelError, match="no tensor 'other'"):
        write_weights(model, {"other": np.ones(3, np.float32)})


def test_copy_holds_all_tensors() -> None:
    model = parse("(float[4] x) => (y) <int64[2] shape = {2,2}, float[2] unused = {1,2}> { y = Reshape(x,shape) }")
    module = import_model(model)
    twin = copy.deepcopy(module)
    assert {name: value.tolist() for name, value in twin.onnx_state().items()} == {"shape": [2, 2], "unused": [1, 2]}
    assert twin(torch.arange(4.0))[0].tolist() == [[0.0, 1.0], [2.0, 3.0]]


NORMED = """(float[N,2] x) => (y) <float[2] a = {1,1}, float[2] b = {0,0}, float[2] mean = {0,0}, float[2] var = {1,1}>
    { y = BatchNormalization(x,a,b,mean,var) }"""


def test_batch_norm_keeps_its_statistics_unless_asked() -> None:
    module = import_model(parse(NORMED)).train()
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert torch.allclose(module(x)[0], x, atol=1e-4)
    assert module.onnx_state()["mean"].tolist() == [0.0, 0.0]


def test_batch_norm_trains_on_the_batch_if_asked() -> None:
    module = import_model(parse(NORMED), batch_norm="train").train()
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert torch.allclose(module(x)[0], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4)
    state = module.onnx_state()
    np.testing.assert_allclose(state["mean"], [0.2, 0.4], rtol=1e-6)
    np.testing.assert_allclose(state["var"], [0.9 + 0.1 * 2, 0.9 + 0.1 * 8], rtol=1e-6)
    module.eval()
    before = module.onnx_state()["mean"]
    module(x)
    assert module.onnx_state()["mean"].tolist() == before.tolist()


def test_shared_statistics_stay_frozen() -> None:
    body = NORMED.replace("y = BatchNormalization(x", "z = BatchNormalization(x,a,b,mean,var) y = BatchNormalization(z")
    module = import_model(parse(body), batch_norm="train").train()
    module(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert module.onnx_state()["mean"].tolist() == [0.0, 0.0]


# Graph compilers.


def test_whole_graph_is_traced_with_symbolic_shapes() -> None:
    module = import_model(parse(BODIES["shape chain"])).eval()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 6, 4)
        assert torch.allclose(compiled(x)[0], module(x)[0])


# What is refused.


def test_unsupported_nodes_are_named_all_at_once() -> None:
    model = parse("(float[2] x) => (y) { [first] a = Nonsense(x) [second] b = com.microsoft.Other(a) y = Relu(b) }")
    assert unsupported(model) == [
        "node 'first' (Nonsense): no such operator",
        "node 'second' (com.microsoft.Other): no such operator",
    ]
    with pytest.raises(UnsupportedError, match=r"2 node.*'first' \(Nonsense\).*'second' \(com.microsoft.Other\)"):
        import_model(model)


def test_unknown_attribute_is_refused() -> None:
    model = parse("(float[2] x) => (y) { [act] y = Relu<slope=0.5>(x) }")
    with pytest.raises(UnsupportedError, match=r"node 'act' \(Relu\): attribute slope"):
        import_model(model)


def test_broken_graph_is_refused() -> None:
    with pytest.raises(ModelError, match="'nowhere' is used before"):
        import_model(parse("(float[2] x) => (y) { y = Add(x,nowhere) }"))


def test_operator_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Conv"):
        register("Conv", torch.relu)


def test_unknown_rank_falls_back_to_tensors() -> None:
    body = "(float[2,3] x, int64[K] s) => (y) { r = Reshape(x,s) t = Shape(r) y = ConstantOfShape(t) }"
    module = import_model(parse(body))
    assert any(node.target is as_numbers for node in module.graph.nodes)
    assert not any(node.target is as_tensor for node in module.graph.nodes)
    assert module(torch.ones(2, 3), torch.tensor([3, 2]))[0].shape == (3, 2)


@pytest.mark.parametrize(
    "name", ["resnet20_gtsrb", "vit_cifar10_smmk47", "tf_bert_tiny_qa", "enet_davidtvs_default_camvid"]
)
def test_new_tensors_are_made_on_the_device_of_the_inputs(name: str) -> None:
    """The meta device stands for any other: it computes shapes only, and refuses tensors of another device."""
    model, _ = imported(name)
    module = import_model(model).to("meta").eval()
    feed = feed_of(model)
    outputs = module(*(to_torch(x).to("meta") for x in feed.values()))
    expected = session_of(model).run(None, feed)
    assert [tuple(output.shape) for output in outputs] == [output.shape for output in expected]


def test_what_is_written_leaves_all_but_the_data_as_it_was() -> None:
    model = _tensor_model(TensorProto.FLOAT, np.array([1.0, 2.0, 3.0], np.float32))
    expected = ModelProto.FromString(model.SerializeToString())
    expected.graph.initializer[0].raw_data = np.array([4.0, 5.0, 6.0], np.float32).tobytes()
    made = write_weights(model, {"layer.0/weight:0": np.array([4.0, 5.0, 6.0], np.float32)})
    assert made.SerializeToString() == expected.SerializeToString()


def test_regions_may_be_none() -> None:
    function = OPERATORS["", "RoiAlign"].function
    empty = function(
        torch.ones(1, 3, 8, 8), torch.zeros(0, 4), torch.zeros(0), opset=16, output_height=2, output_width=5
    )
    assert empty.shape == (0, 3, 2, 5)


def test_regions_of_images_that_are_not_there_are_named() -> None:
    x, corners = torch.ones(1, 3, 8, 8), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    with pytest.raises(UnsupportedError, match="RoiAlign has a region in image 1 in a batch of 1"):
        OPERATORS["", "RoiAlign"].function(x, corners, torch.ones(1), opset=16, output_height=2, output_width=2)
    with pytest.raises(UnsupportedError, match="MaxRoiPool has a region in image 1 in a batch of 1"):
        OPERATORS["", "MaxRoiPool"].function(x, torch.cat([torch.ones(1, 1), corners], 1), pooled_shape=[2, 2])


SIZES = {
    "the largest of three": ("s = Shape(x) r, c = Split<num_outputs=2>(s) k = Constant<value=int64[1]{5}>() m = Max(r, k, c)"
                             " y = ConstantOfShape(m)", (7,)),
    "the least of one": ("s = Shape(x) r, c = Split<num_outputs=2>(s) m = Min(r) y = ConstantOfShape(m)", (4,)),
    "a reduction that reduces nothing": ("s = Shape(x) m = ReduceProd<noop_with_empty_axes=1>(s) y = ConstantOfShape(m)", (4, 7)),
    "a quotient beyond 53 bits": ("s = Constant<value=int64[1]{9007199254740993}>() d = Constant<value=int64[1]{1}>()"
                                  " k = Constant<value=int64[1]{8}>() q = Div(s, d) m = Mod(q, k) y = ConstantOfShape(m)", (1,)),
}  # fmt: skip  # a table


@pytest.mark.parametrize("what", SIZES)
def test_shape_arithmetic_of_all_kinds(what: str) -> None:
    body, expected = SIZES[what]
    model = parse(f"(float[4, N] x) => (float[A] y) {{ {body} }}", 18)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (made,) = import_model(model)(torch.zeros(4, 7))
    assert tuple(made.shape) == expected


def test_what_would_be_huge_is_not_made_while_importing() -> None:
    body = "n = Constant<value=int64{4000000000000}>() z = Constant<value=int64{0}>() o = Constant<value=int64{1}>()"
    model = parse(f"(float[4] x) => (int64[M] r, float[4] y) {{ {body} r = Range(z, n, o) y = Relu(x) }}")
    import_model(model)  # runs out of memory only when it is run


def test_nodes_may_be_stored_in_any_order() -> None:
    text = """(float[N, 3] x, bool xc) => (float[N, 2] y) {
        h = MatMul (x, w)
        s = If (xc) <then_branch = t () => (float[N, 4] o) { d = Add (h, h) o = Relu (d) },
                     else_branch = e () => (float[N, 4] o) { o = Neg (h) }>
        g = Relu (s)
        y = MatMul (g, v)
    }"""
    model = from_text(text.replace("bool xc)", "bool xc, float[3, 4] w, float[4, 2] v)"))
    shuffled = copy.deepcopy(model)
    for graph in (shuffled.graph, shuffled.graph.node[1].attribute[0].g):
        nodes = list(graph.node)[::-1]
        graph.ClearField("node")
        graph.node.extend(nodes)
    assert [node.op_type for node in shuffled.graph.node] == ["MatMul", "Relu", "If", "MatMul"]
    x, flag = torch.randn(2, 3), torch.tensor(True)
    found, wanted = (import_model(each)(x, flag)[0] for each in (shuffled, model))
    torch.testing.assert_close(found, wanted)
    assert [node.op_type for node in shuffled.graph.node] == ["MatMul", "Relu", "If", "MatMul"]  # it is not changed


def test_a_cycle_is_told() -> None:
    model = from_text("(float[2] x) => (float[2] y) { a = Add (x, b) b = Neg (a) y = Relu (a) }")
    with pytest.raises(ModelError, match="'b' is used before any node computes it"):
        import_model(model)


@pytest.mark.parametrize("value", ["value_floats = [1.0, 2.0]", "value_float = 3.0", "value = float[2] {4, 5}"])
def test_numbers_of_constant_nodes_are_weights(value: str) -> None:
    model = from_text(f"(float[N, 2] x) => (float[N, 2] y) {{ b = Constant <{value}> () y = Add (x, b) }}")
    before = read_weights(model)["b"]
    made = write_weights(model, {"b": before + 1})
    np.testing.assert_array_equal(read_weights(made)["b"], before + 1)
    np.testing.assert_array_equal(read_weights(model)["b"], before)
    with pytest.raises(ModelError, match="'b' is float32"):
        write_weights(model, {"b": np.zeros((3, 3), np.float32)})


def test_classes_are_drawn_by_their_probability() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2,3] x) => (int64[2,1000] y) '
        "{ y = Multinomial <dtype = 7, sample_size = 1000>(x) }"
    )
    (y,) = import_model(model)(torch.tensor([[-1e9, 0.0, -1e9], [0.0, np.log(3), -1e9]]))
    assert y.dtype == torch.int64
    assert set(y[0].tolist()) == {1}
    assert set(y[1].tolist()) == {0, 1}
    assert abs(y[1].double().mean() - 0.75) < 0.1
