"""Hostile and broken files through the command line: one clear line or a proved result, in bounded time and memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.runtime import sessions as runtime
from tests.support.runs import plain

SECONDS = 20
"""Of processor time that a command may take."""
IDLE_SECONDS = 60
"""Of wall time in which a command that takes no processor time is stuck."""
BYTES = 3 << 30
"""Of address space, beyond what the process has at the start."""


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def info(name: str, shape: list[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def net(*nodes: NodeProto, opset: int = 17, inputs: Any = None, outputs: Any = None, **values: Any) -> ModelProto:
    """A model with two matrices, h = x w, and nodes from h to z: y = z v."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((4, 8)).astype("f"), "v": rng.standard_normal((8, 4)).astype("f")} | values
    tensors = [
        a if isinstance(a, TensorProto) else numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()
    ]
    made = [node("MatMul", "x w", "h"), *nodes, node("MatMul", "z v" if nodes else "h v", "y")]
    graph = helper.make_graph(made, "g", inputs or [info("x", [2, 4])], outputs or [info("y", [2, 4])], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def changed(change: Callable[[ModelProto], object], *nodes: NodeProto, **values: Any) -> ModelProto:
    model = net(*nodes, **values)
    change(model)
    return model


def raw(name: str, dims: list[int], content: bytes, kind: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(name=name, dims=dims, data_type=kind, raw_data=content)


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def convolution(channels: int = 8, **attributes: Any) -> ModelProto:
    """One of h, with a kernel that takes so many channels."""
    nodes = node("Unsqueeze", "h n", "u"), node("Conv", "u k", "z", **attributes)
    return net(*nodes, n=ints(2), k=np.ones((8, channels, 1), "f"))


def doubled(times: int) -> ModelProto:
    """A constant that is twice as long after each node."""
    nodes = [node("Concat", f"c{n} c{n}", f"c{n + 1}", axis=0) for n in range(times)]
    return net(*nodes, node("ReduceSum", f"c{times}", "s"), node("Add", "h s", "z"), c0=np.ones(1024, "f"))


def nested(levels: int) -> ModelProto:
    """If in If in If."""

    def body(level: int, name: str) -> GraphProto:
        inner = [node("Identity", "h", name)]
        if level:
            branches = {b: body(level - 1, f"{name}{b[0]}") for b in ("then_branch", "else_branch")[:1]}
            inner = [node("If", "b", name, then_branch=branches["then_branch"], else_branch=leaf(f"{name}e"))]
        return helper.make_graph(inner, name, [], [info(name, [2, 8])])

    def leaf(name: str) -> GraphProto:
        return helper.make_graph([node("Identity", "h", name)], name, [], [info(name, [2, 8])])

    return net(
        node("If", "b", "z", then_branch=body(levels, "t"), else_branch=leaf("e")),
        inputs=[info("x", [2, 4]), info("b", [], TensorProto.BOOL)],
    )


def functions(levels: int, calls: int) -> ModelProto:
    """Functions that call the one below so many times."""
    model = net(helper.make_node(f"f{levels}", ["h"], ["z"], domain="local"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model.opset_import.append(opsets[1])
    model.functions.append(helper.make_function("local", "f0", ["a"], ["b"], [node("Relu", "a", "b")], opsets))
    for level in range(levels):
        names = ["a", *(f"t{n}" for n in range(calls - 1)), "b"]
        nodes = [helper.make_node(f"f{level}", [i], [o], domain="local") for i, o in itertools.pairwise(names)]
        model.functions.append(helper.make_function("local", f"f{level + 1}", ["a"], ["b"], nodes, opsets))
    return model


def loop(count: int) -> ModelProto:
    """A Loop of a constant number of rounds."""
    body = helper.make_graph(
        [node("Identity", "cond_in", "cond_out"), node("Relu", "state", "next")], "body",
        [info("i", [], TensorProto.INT64), info("cond_in", [], TensorProto.BOOL), info("state", [2, 8])],
        [info("cond_out", [], TensorProto.BOOL), info("next", [2, 8])],
    )  # fmt: skip  # one graph
    return net(node("Loop", "n c h", "z", body=body), n=ints(count)[0], c=np.asarray(True))


def without_counter() -> ModelProto:
    """A Loop whose body has no input for the number of the round, behind an operator at which onnx's checker stops."""
    model = loop(3)
    model.graph.node.insert(1, node("Gelu", "h", "g", domain="com.microsoft"))
    model.graph.node[2].input[2] = "g"
    del model.graph.node[2].attribute[0].g.input[0]
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


HUGE = 1 << 40


def resize(name: str) -> NodeProto:
    return helper.make_node("Resize", ["c", "", "f"], [name])


SUM = (node("ReduceSum", "big", "s"), node("Add", "h s", "z"))
MODELS: dict[str, Callable[[], ModelProto]] = {
    "constant of terabytes": lambda: net(node("ConstantOfShape", "n", "big"), *SUM, n=ints(HUGE)),
    "constant of overflowing size": lambda: net(node("ConstantOfShape", "n", "big"), *SUM, n=ints(1 << 62, 1 << 62)),
    "constant of negative size": lambda: net(node("ConstantOfShape", "n", "big"), *SUM, n=ints(-3)),
    "expanded to terabytes": lambda: net(node("Expand", "c n", "big"), *SUM, c=np.float32(1), n=ints(HUGE)),
    "tiled to terabytes": lambda: net(node("Tile", "c n", "big"), *SUM, c=np.ones(4, "f"), n=ints(HUGE)),
    "padded to terabytes": lambda: net(node("Pad", "c n", "big"), *SUM, c=np.ones(4, "f"), n=ints(0, HUGE)),
    "range without end": lambda: net(
        node("Range", "a b c", "r"), node("Cast", "r", "big", to=1), *SUM, a=ints(0)[0], b=ints(1 << 60)[0], c=ints(1)[0]
    ),
    "range without step": lambda: net(
        node("Range", "a b c", "r"), node("Cast", "r", "big", to=1), *SUM, a=ints(0)[0], b=ints(9)[0], c=ints(0)[0]
    ),
    "one-hot of terabytes": lambda: net(
        node("OneHot", "i d p", "big"), *SUM, i=ints(1), d=ints(HUGE)[0], p=np.asarray([0, 1], "f")
    ),
    "resized to terabytes": lambda: net(
        resize("big"), *SUM, c=np.ones((1, 1, 4, 4), "f"), f=np.asarray([1, 1, 1e6, 1e6], "f")
    ),
    "resized to less than nothing": lambda: net(
        resize("r"), node("Slice", "r a b a", "big"), *SUM,
        c=np.ones((1, 1, 4, 4), "f"), f=np.asarray([-1e-12, 1, 2, 2], "f"), a=ints(0), b=ints(1),
    ),
    "doubled fifty times": lambda: doubled(50),
    "nested thirty deep": lambda: nested(30),
    "functions that call each other twice": lambda: functions(40, 2),
    "a long chain of functions": lambda: functions(400, 1),
    "a loop without end": lambda: loop(1 << 62),
    "dims that overflow": lambda: net(w=raw("w", [1 << 62, 1 << 62], b"")),
    "dims beyond the data": lambda: net(w=raw("w", [1 << 40, 8], bytes(128))),
    "long dims beyond little data": lambda: net(w=raw("w", [1 << 28, 8], bytes(128))),
    "dims without data": lambda: net(w=TensorProto(name="w", dims=[4, 1 << 27], data_type=TensorProto.FLOAT)),
    "negative dims": lambda: net(w=raw("w", [-4, -8], bytes(128))),
    "more data than dims": lambda: net(w=raw("w", [4, 8], bytes(4096))),
    "half an element": lambda: net(w=raw("w", [4, 8], bytes(127))),
    "unknown element type": lambda: net(w=raw("w", [4, 8], bytes(128), 77)),
    "no element type": lambda: net(w=raw("w", [4, 8], bytes(128), 0)),
    "strings as weights": lambda: net(w=helper.make_tensor("w", TensorProto.STRING, [4, 8], [b"a"] * 32)),
    "long strings as weights": lambda: net(w=raw("w", [64, 64], bytes(1 << 15), TensorProto.STRING)),
    "integers as weights": lambda: net(w=np.ones((4, 8), np.int64)),
    "weights that are no numbers": lambda: net(w=np.full((4, 8), np.nan, "f")),
    "endless weights": lambda: net(w=np.full((4, 8), np.inf, "f")),
    "shapes that do not match": lambda: net(v=np.ones((9, 4), "f")),
    "negative input": lambda: net(inputs=[info("x", [-2, 4])]),
    "terabytes of input": lambda: net(inputs=[info("x", [HUGE, 4])], outputs=[info("y", [HUGE, 4])]),
    "overflowing input": lambda: net(inputs=[info("x", [1 << 62, 4])], outputs=[info("y", [1 << 62, 4])]),
    "an input without a type": lambda: net(inputs=[onnx.ValueInfoProto(name="x")]),
    "a sequence as input": lambda: net(inputs=[helper.make_tensor_sequence_value_info("x", 1, [2, 4])]),
    "a cycle": lambda: net(node("Add", "h q", "z"), node("Relu", "z", "q")),
    "a node that feeds itself": lambda: net(node("Add", "h z", "z")),
    "a value that nobody makes": lambda: net(node("Add", "h nobody", "z")),
    "a value that two make": lambda: net(node("Relu", "h", "z"), node("Sigmoid", "h", "z")),
    "two weights of one name": lambda: changed(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
    "an output that nobody makes": lambda: net(outputs=[info("y", [2, 4]), info("nobody", [2])]),
    "no outputs": lambda: changed(lambda m: m.graph.ClearField("output")),
    "no nodes": lambda: changed(lambda m: m.graph.ClearField("node")),
    "no graph": lambda: changed(lambda m: m.ClearField("graph")),
    "no operator set": lambda: changed(lambda m: m.ClearField("opset_import")),
    "operator set from the future": lambda: net(opset=999),
    "operator set zero": lambda: net(opset=0),
    "negative operator set": lambda: net(opset=-1),
    "an operator that is unknown": lambda: net(node("Strange", "h", "z")),
    "an operator without a name": lambda: net(node("", "h", "z")),
    "a domain that is unknown": lambda: net(helper.make_node("Strange", ["h"], ["z"], domain="no.such")),
    "an operator without inputs": lambda: net(NodeProto(op_type="Relu", output=["z"])),
    "an operator without outputs": lambda: net(NodeProto(op_type="Relu", input=["h"]), node("Relu", "h", "z")),
    "too many inputs": lambda: net(node("Relu", "h h h", "z")),
    "names that are not text": lambda: changed(lambda m: None, node("Relu", "h", "z")),
    "a name of a megabyte": lambda: net(node("Relu", "h", "q" * (1 << 20)), node("Relu", "q" * (1 << 20), "z")),
    "a name of two lines": lambda: net(node("Relu", "h", "z", name="one\ntwo"), helper.make_node("Bad\nName", ["h"], ["u"])),
    "a transposition twice the same": lambda: net(node("Transpose", "h", "z", perm=[0, 0])),
    "a transposition of five": lambda: net(node("Transpose", "h", "z", perm=[0, 1, 2, 3, 4])),
    "an axis too far": lambda: net(node("Softmax", "h", "z", axis=99)),
    "a concatenation along axis 99": lambda: net(node("Concat", "h h", "z", axis=99)),
    "a concatenation without axis": lambda: net(node("Concat", "h h", "z")),
    "an attribute of another type": lambda: net(node("Transpose", "h", "z", perm="sideways")),
    "an axis that is a fraction": lambda: net(node("Softmax", "h", "z", axis=0.5)),
    "a reshape that does not divide": lambda: net(node("Reshape", "h n", "z"), n=ints(3, -1)),
    "a reshape to minus five": lambda: net(node("Reshape", "h n", "z"), n=ints(-5, 8)),
    "a reshape with two open axes": lambda: net(node("Reshape", "h n", "z"), n=ints(-1, -1)),
    "a reshape to terabytes": lambda: net(node("Reshape", "h n", "z"), n=ints(HUGE, 1)),
    "a reshape without shape": lambda: net(node("Reshape", "h", "z")),
    "a split into negative parts": lambda: net(node("Split", "h n", "z u", axis=1), n=ints(12, -4)),
    "a split into too many": lambda: net(node("Split", "h n", "z u", axis=1), n=ints(4, 400)),
    "a slice of step zero": lambda: net(node("Slice", "h a b c d", "z"), a=ints(0), b=ints(8), c=ints(1), d=ints(0)),
    "a squeeze of what is not there": lambda: net(node("Squeeze", "h n", "z"), n=ints(7)),
    "a gather out of range": lambda: net(node("Gather", "h n", "z", axis=1), n=ints(*[99] * 8)),
    "a pad that takes all away": lambda: net(node("Pad", "h n", "z"), n=ints(0, -9, 0, -9)),
    "a convolution of no groups": lambda: convolution(group=0),
    "a convolution of three groups": lambda: convolution(group=3),
    "a convolution of negative groups": lambda: convolution(1, group=-8),
    "a convolution with stride zero": lambda: convolution(strides=[0]),
    "a convolution with strides of minus one": lambda: convolution(strides=[-1]),
    "a kernel of another size": lambda: convolution(kernel_shape=[5]),
    "a convolution that pads terabytes": lambda: convolution(pads=[HUGE, HUGE]),
    "a normalisation of another width": lambda: net(node("BatchNormalization", "h a a a a", "z"), a=np.ones(5, "f")),
    "a convolution that cuts more than there is": lambda: convolution(pads=[-9, -9]),
    "batch axes counted from the end": lambda: net(node("GatherND", "h n", "z", batch_dims=-2), n=ints(0)[:, None]),
    "a transposed convolution of no groups": lambda: net(
        node("Unsqueeze", "h n", "u"), node("ConvTranspose", "u k", "z", group=0), n=ints(2), k=np.ones((8, 8, 1), "f")
    ),
    "attention without heads": lambda: net(
        node("Unsqueeze", "h n", "u"), node("Attention", "u u u", "z", q_num_heads=0, kv_num_heads=0), n=ints(2), opset=23
    ),
    "attention of more heads than channels": lambda: net(
        node("Unsqueeze", "h n", "u"), node("Attention", "u u u", "z", q_num_heads=1 << 40, kv_num_heads=1), n=ints(2), opset=23
    ),
    "depth to space by so much that nothing is left": lambda: net(
        node("Unsqueeze", "h n", "u"), node("DepthToSpace", "u", "z", blocksize=1 << 40), n=ints(2, 3)
    ),
    "scales of another length": lambda: net(
        node("DequantizeLinear", "q s", "d", axis=1), node("MatMul", "h d", "z"), q=np.ones((8, 8), np.int8), s=np.ones(3, "f")
    ),
    "branches that give nothing": lambda: net(
        node("If", "b", "z", then_branch=helper.make_graph([], "t", [], []), else_branch=helper.make_graph([], "e", [], [])),
        b=np.asarray(True),
    ),
    "a scan of more than there is": lambda: net(
        node("Scan", "h", "z", num_scan_inputs=7, body=helper.make_graph([], "b", [], [info("s", [8])]))
    ),
    "an If without branches": lambda: net(node("If", "b", "z"), b=np.asarray(True)),
    "a Loop whose body takes too little": without_counter,
    "a Loop without body": lambda: net(node("Loop", "n b h", "z"), n=ints(3)[0], b=np.asarray(True)),
    "a sparse weight of terabytes": lambda: changed(
        lambda m: m.graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=raw("sp", [1], bytes(4)), indices=raw("", [1], bytes(8), 7), dims=[HUGE, HUGE])
        )
    ),
    "four bits too few": lambda: net(w=raw("w", [4, 8], bytes(3), TensorProto.INT4)),
}  # fmt: skip  # a table


FORKSERVER = get_context("forkserver")
"""Starts the commands from a process without threads, as a lock that one of them holds would be held in a fork for ever."""
FORKSERVER.set_forkserver_preload(["torch", __name__])


def limited(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and complaint of a command in a process of its own, with bounds.

    The time is that of the processor: on a busy machine a command may wait for its turn, but not sleep all the time.
    """
    log = folder / "log"
    child = FORKSERVER.Process(target=in_bounds, args=(plain(arguments), log))
    child.start()
    used = 0.0
    while child.exitcode is None:
        child.join(IDLE_SECONDS)
        before, used = used, seconds_used(child.pid)
        if child.exitcode is None and used <= before:
            child.kill()
            child.join()
            return -signal.SIGALRM, f"idle for {IDLE_SECONDS} s: {log.read_text(errors='replace')}"
    return child.exitcode, log.read_text(errors="replace")


def seconds_used(process: int | None) -> float:
    """Processor time of a process, of all its threads; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_bounds(arguments: list[str], log: Path) -> None:
    """Run a command with bounds on memory and processor time, and end the process with its exit code."""
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout = sys.stderr = os.fdopen(handle, "w")
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        runtime.RUN_SECONDS = SECONDS / 4
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "out").mkdir()
    yield tmp_path
    for file in (tmp_path / "out").iterdir():
        assert not file.name.endswith(".part"), file


def checked(arguments: list[str], folder: Path) -> str:
    """Run a command: it succeeds, or says in one line what is wrong and writes nothing; what it said."""
    code, said = limited(arguments, folder)
    assert code in (0, 1), f"exit code {code}: {said[-2000:]}"
    assert "Traceback" not in said, said[-2000:]
    if code:
        complaints = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(complaints) == 1, said[-2000:]
        assert said.rstrip().endswith(complaints[0]), said[-2000:]
        assert len(complaints[0]) < 1500
        assert not list((folder / "out").iterdir())
    return said if code else ""


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, folder: Path) -> None:
    path = folder / "model.onnx"
    content = MODELS[name]().SerializeToString()
    if name == "names that are not text":
        content = content.replace(b"\x0a\x01h", b"\x0a\x01\xff")
    path.write_bytes(content)
    checked(["inspect", str(path)], folder)
    said = checked(["prune", str(path), "-o", str(folder / "out" / "small.onnx")], folder)
    assert "error: internal error" not in said
    if not said and is_valid(path):
        assert is_valid(folder / "out" / "small.onnx")
    with contextlib.suppress(cpd.CpdError):  # nor is anything else raised in Python
        cpd.run("comb", path)


def is_valid(path: Path) -> bool:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message."""
    length, size = bytearray(), len(content)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def nested_bytes(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on, which protobuf refuses to write."""
    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "noise": (np.random.default_rng(0).bytes(4096), "not a complete ONNX file|empty"),
    "text": (b"this is no model\n" * 100, "not a complete ONNX file|empty"),
    "json": (b'{"graph": []}', "not a complete ONNX file|empty"),
    "an archive": (b"PK\x03\x04" + bytes(1000), "not a complete ONNX file|empty"),
    "nested a thousand deep": (nested_bytes(1000), "not a complete ONNX file"),
    "zeros": (bytes(100_000), "not a complete ONNX file|empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_models(name: str, folder: Path) -> None:
    content, complaint = FILES[name]
    (folder / "model.onnx").write_bytes(content)
    assert re.search(
        complaint, checked(["prune", str(folder / "model.onnx"), "-o", str(folder / "out/s.onnx")], folder)
    )


def test_places_that_are_no_files(folder: Path) -> None:
    for place in (folder, folder / "nowhere.onnx", folder / "no" / "where.onnx"):
        assert "cannot read" in checked(["prune", str(place), "-o", str(folder / "out/s.onnx")], folder)


EXTERNAL: dict[str, tuple[dict[str, str], str]] = {
    "an absolute path": ({"location": "/etc/passwd"}, "is outside the model's folder"),
    "a path upwards": ({"location": "../secret"}, "is outside the model's folder"),
    "a hidden path upwards": ({"location": "sub/../../secret"}, "is outside the model's folder"),
    "a link": ({"location": "link"}, "links out"),
    "a link to a device": ({"location": "device"}, "links out"),
    "a folder": ({"location": "sub"}, "missing"),
    "a pipe": ({"location": "pipe"}, "missing"),
    "nothing": ({"location": ""}, "is outside the model's folder"),
    "no location": ({}, "is outside the model's folder"),
    "a name with a zero": ({"location": "da\0ta"}, "is outside the model's folder"),
    "a name too long": ({"location": "a" * 5000}, "external data file"),
    "a missing file": ({"location": "gone"}, "missing"),
    "a negative offset": ({"location": "data", "offset": "-8"}, "needs 128 bytes"),
    "an offset behind the end": ({"location": "data", "offset": "4096"}, "needs 128 bytes"),
    "an overflowing offset": ({"location": "data", "offset": str(1 << 63)}, "needs 128 bytes"),
    "an offset of many digits": ({"location": "data", "offset": "9" * 5000}, "integers"),
    "an offset in words": ({"location": "data", "offset": "ten"}, "integers"),
    "a length of terabytes": ({"location": "data", "length": str(HUGE)}, "needs 128 bytes"),
    "a negative length": ({"location": "data", "length": "-1"}, "needs 128 bytes"),
    "a length too short": ({"location": "data", "length": "64"}, "needs 128 bytes"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data(name: str, folder: Path) -> None:
    entries, complaint = EXTERNAL[name]
    tensor = TensorProto(name="w", dims=[4, 8], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    inside = folder / "in"
    inside.mkdir()
    (inside / "sub").mkdir()
    (inside / "data").write_bytes(bytes(256))
    (folder / "secret").write_bytes(bytes(256))
    (inside / "link").symlink_to(folder / "secret")
    (inside / "device").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe")
    (inside / "model.onnx").write_bytes(net(w=tensor).SerializeToString())
    said = checked(["prune", str(inside / "model.onnx"), "-o", str(folder / "out/s.onnx")], folder)
    assert re.search(complaint, said), said


def test_plans_that_do_not_belong(folder: Path) -> None:
    first, second, small = folder / "a.onnx", folder / "b.onnx", folder / "small.onnx"
    first.write_bytes(net().SerializeToString())
    second.write_bytes(net(v=np.ones((8, 4), "f")).SerializeToString())
    assert limited(["prune", str(first), "-o", str(small)], folder)[0] == 0
    plan = json.loads(Path(f"{small}.plan.json").read_text())
    out = ["-o", str(folder / "out/s.onnx")]

    def told(change: Callable[[Any], object] | str, model: Path = first) -> str:
        copy = json.loads(json.dumps(plan))
        path = folder / "plan.json"
        if not isinstance(change, str):
            change(copy)
        path.write_text(change if isinstance(change, str) else json.dumps(copy))
        return checked(["apply", str(model), str(path), *out], folder)

    assert "sha256" in told(lambda p: None, second)
    assert "out of range" in told(lambda p: p["groups"][0].update(removed=[99]))
    assert "output 'y' would be gone" in told(lambda p: p["groups"][0].update(removed=list(range(8))))
    assert "out of range" in told(lambda p: p["groups"][0].update(removed=[1 << 80]))
    assert told(lambda p: p["groups"][0].update(id=77))
    assert told(lambda p: p["groups"].append(p["groups"][0]))
    assert told(lambda p: p.update(groups=7))
    assert told(lambda p: p.update(version=99))
    assert told(lambda p: p.clear())
    assert "not JSON" in told("{" * 100)
    assert "not JSON" in told("[" * 200_000)
    assert told("[]")
    assert told("null")


def test_tampering_with_the_pair(folder: Path) -> None:
    """A change of the original, of the plan, or of anything but the values of trained weights is seen."""
    original, small, plan = folder / "a.onnx", folder / "small.onnx", folder / "small.onnx.plan.json"
    original.write_bytes(net().SerializeToString())
    assert limited(["prune", str(original), "-o", str(small)], folder)[0] == 0
    assert limited(["verify", str(original), str(small)], folder)[0] == 0
    content, words = small.read_bytes(), plan.read_text()

    def told() -> str:
        code, said = limited(["verify", str(original), str(small)], folder)
        assert code in (1, 5)
        assert "Traceback" not in said
        return said

    def with_change(change: Callable[[ModelProto], object]) -> str:
        model = ModelProto.FromString(content)
        change(model)
        small.write_bytes(model.SerializeToString())
        said = told()
        small.write_bytes(content)
        return said

    for change in (
        lambda m: m.metadata_props[-1].__setattr__("value", "0" * 64),
        lambda m: m.metadata_props.add(key="who", value="me"),
        lambda m: m.graph.node[0].__setattr__("name", "another"),
        lambda m: m.graph.output[0].__setattr__("name", "h"),
        lambda m: m.opset_import[0].__setattr__("version", 16),
        lambda m: m.graph.initializer.add().CopyFrom(m.graph.initializer[0]),
    ):
        assert "not what the plan makes" in with_change(change)
    changed_plan = json.loads(words)
    changed_plan["groups"][0]["removed"] = changed_plan["groups"][0]["removed"][1:]
    plan.write_text(json.dumps(changed_plan))
    assert "not what the plan makes" in told()
    changed_plan = json.loads(words)
    changed_plan["budget"]["target"] = 0.99
    plan.write_text(json.dumps(changed_plan))
    assert "not what the plan makes" in told()
    plan.write_text(words)
    original.write_bytes(net(v=np.ones((8, 4), "f")).SerializeToString())
    assert "sha256" in told()


def test_data_that_is_hostile(folder: Path) -> None:
    model, data = folder / "m.onnx", folder / "d.npz"
    model.write_bytes(net().SerializeToString())
    command = ["prune", str(model), "-o", str(folder / "out/s.onnx"), "--data", str(data)]
    np.savez(data, x=np.asarray([{"a": 1}], dtype=object))
    assert checked(command, folder)
    np.savez(data, x=np.zeros((4, 4, 4), "f"))
    assert checked(command, folder)
    np.savez(data, other=np.zeros((4, 4), "f"))
    assert checked(command, folder)
    np.savez(data, x=np.zeros((0, 4), "f"))
    assert checked(command, folder)
    np.savez(data, x=np.full((8, 4), np.nan, "f"))
    assert checked(command, folder)
    data.write_bytes(b"PK\x03\x04nothing")
    assert checked(command, folder)


SENSELESS: dict[str, Callable[[], ModelProto]] = {
    "two results of one": lambda: net(node("Concat", "i i", "s rest", axis=0), node("Reshape", "h s", "z"), i=ints(2)),
    "one type for several": lambda: net(node("Cast", "h", "z", to=[1, 7])),
    "channels in no whole groups": lambda: net(
        node("Unsqueeze", "h last", "u"), node("Conv", "u k", "c", group=3), node("Squeeze", "c last", "z"),
        last=ints(2), k=np.ones((8, 8, 1), "f"),
    ),
    "a constant of two": lambda: changed(lambda m: m.graph.node.append(node("Constant", "", "c d", value_float=1.0))),
    "no outputs": lambda: changed(lambda m: m.graph.ClearField("output")),
    "a shape that does not fit, behind all weights": lambda: changed(
        lambda m: m.graph.node.extend([
            node("Shape", "x", "s"), node("Concat", "s more", "t", axis=0), node("Reshape", "y t", "r"),
        ]),
        more=ints(7), inputs=[info("x", ["n", 4])], outputs=[info("y", ["n", 4]), info("r", None)],
    ),
    "a shape that does not fit": lambda: net(
        node("Shape", "x", "s"), node("Concat", "s more", "t", axis=0), node("Reshape", "h t", "r"),
        node("Squeeze", "r last", "z"), more=ints(7), last=ints(2), inputs=[info("x", ["n", 4])], outputs=[info("y", None)],
    ),
    "windows of less than nothing": lambda: net(
        node("Unsqueeze", "h last", "u"), node("MaxPool", "u", "c", kernel_shape=[-(1 << 63)]), node("Squeeze", "c last", "z"),
        last=ints(2),
    ),
}  # fmt: skip  # one model each
COMMANDS = {
    "bench": "bench MODEL --seconds 0.1",
    "compress": "compress MODEL -o OUT --data synthetic --samples 8 --repair-samples 8 --steps 2 --batch-size 2 --threads 1",
    "distill": "distill MODEL MODEL -o OUT --data synthetic --steps 2 --batch-size 2 --threads 1",
    "inspect": "inspect MODEL --sensitivity --data synthetic --samples 8",
    "prune": "prune MODEL -o OUT --data synthetic --samples 8 --score fisher",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SENSELESS)
def test_no_command_takes_a_model_without_sense_for_its_own_defect(name: str, command: str, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(SENSELESS[name]().SerializeToString())
    words = {"MODEL": str(path), "OUT": str(folder / "out" / "made")}
    said = checked([words.get(word, word) for word in COMMANDS[command].split()], folder)
    assert "error: internal error" not in said
