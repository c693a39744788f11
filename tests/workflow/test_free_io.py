"""Inputs and outputs that may lose channels: caches of attention, states, and the programs around the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli.main import main
from cpd_onnx.ir.interface import PREFIX, cut, kept_by
from cpd_onnx.ir.model import load
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.runtime.sessions import execute, open_model
from tests.support.models import from_text

HEADS, SIZE, WIDTH, LAYERS = 4, 8, 32, 2
FEW = ("--blind", "--no-check-speed", "--no-repair")
HALF_OF_THE_HEADS = (
    *("--width", "wq0=1..1", "--width", "wq1#2=1..1", "--width", "wv?=1..1"),
    *("--width", "wq0#2=0.5..0.5", "--width", "wq1=0.5..0.5"),
)


def layer(number: int, x: str, y: str) -> str:
    """One attention with a cache, and a residual connection."""
    n = number
    parts = [
        f"{kind}{n} = MatMul({x}, w{kind}{n}) {kind}r{n} = Reshape({kind}{n}, split)"
        f" {kind}t{n} = Transpose<perm = [0, 2, 1, 3]>({kind}r{n})"
        for kind in "qkv"
    ]
    return " ".join(
        [
            *parts,
            f"present_{n}_key = Concat<axis = 2>(x_past_{n}_key, kt{n})",
            f"present_{n}_value = Concat<axis = 2>(x_past_{n}_value, vt{n})",
            f"kk{n} = Transpose<perm = [0, 1, 3, 2]>(present_{n}_key) s{n} = MatMul(qt{n}, kk{n})",
            f"p{n} = Softmax<axis = 3>(s{n}) o{n} = MatMul(p{n}, present_{n}_value)",
            f"ot{n} = Transpose<perm = [0, 2, 1, 3]>(o{n}) or{n} = Reshape(ot{n}, merge)",
            f"oo{n} = MatMul(or{n}, wo{n}) {y} = Add({x}, oo{n})",
        ]
    )


def decoder() -> onnx.ModelProto:
    """A decoder of two layers; the second one's heads weigh more, so that scores alone would take those of the first."""
    caches = [f"{n}_{kind}" for n in range(LAYERS) for kind in ("key", "value")]
    shape = f"[N,{HEADS},P,{SIZE}]"
    inputs = [f"float[N,S,{WIDTH}] x", *(f"float{shape} x_past_{name}" for name in caches)]
    weights = [f"float[{WIDTH},{WIDTH}] w{kind}{n}" for n in range(LAYERS) for kind in "qkvo"]
    constants = ["int64[4] split", "int64[3] merge", f"float[{WIDTH},10] wy"]
    outputs = ["float[N,S,10] y", *(f"float[N,{HEADS},T,{SIZE}] present_{name}" for name in caches)]
    nodes = f"{layer(0, 'x', 'h')} {layer(1, 'h', 'g')} y = MatMul(g, wy)"
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {"split": [0, 0, HEADS, SIZE], "merge": [0, 0, WIDTH]}
    for n in range(LAYERS):
        for kind in "qkvo":
            values[f"w{kind}{n}"] = rng.standard_normal((WIDTH, WIDTH)) * (0.1 + 0.2 * n)
    text = f"({', '.join((*inputs, *weights, *constants))}) => ({', '.join(outputs)}) {{ {nodes} }}"
    return from_text(text, values=values)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "whole").mkdir()
    (tmp_path / "small").mkdir()
    onnx.save(decoder(), tmp_path / "whole" / "model.onnx")
    rng = np.random.default_rng(1)
    caches = {f"x_past_{n}_{kind}": (HEADS, 3, SIZE) for n in range(LAYERS) for kind in ("key", "value")}
    shapes = {"x": (5, WIDTH), **caches}
    np.savez(tmp_path / "data.npz", **{k: rng.standard_normal((96, *s)).astype(np.float32) for k, s in shapes.items()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> int:
    return main([*map(str, words)])


def pruned(*words: object, free: str = "caches") -> onnx.ModelProto:
    asked = ("prune", "whole/model.onnx", "-o", "small/model.onnx", "--free-io", free, "--force")
    assert run(*asked, *words) == 0
    return onnx.load("small/model.onnx")


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    infos = (*model.graph.input, *model.graph.output)
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in infos}


def groups_of(combed: Combed) -> list[str]:
    return [group.kind for group in combed.groups]


def test_caches_hold_the_heads_unless_they_are_free(folder: Path) -> None:
    model = load("whole/model.onnx")
    assert not groups_of(comb(model))
    names = [name for name in shapes_of(model.proto) if "past" in name or "present" in name]
    assert groups_of(comb(model.with_free_io(names))).count("heads") == LAYERS
    assert not groups_of(comb(model)), "the model itself is unchanged"


@pytest.mark.parametrize("policy", ["optimal", "uniform"])
def test_caches_lose_heads_alike_and_the_file_says_which(folder: Path, policy: str) -> None:
    small = pruned("--target", "params=0.6", "--policy", policy, *FEW)
    caches = {tuple(shape) for name, shape in shapes_of(small).items() if "past" in name}
    assert len(caches) == 1, "all layers alike"
    (_, heads, _, size) = next(iter(caches))
    assert int(heads) * int(size) < HEADS * SIZE
    assert shapes_of(small)["x"] == ["N", "S", WIDTH]
    assert shapes_of(small)["present_1_value"][1] == heads
    kept = kept_by(small)["x_past_0_key"]
    assert [len(kept.get(axis, range(full))) for axis, full in ((1, HEADS), (3, SIZE))] == [heads, size]
    plan = load_plan("small/model.onnx.plan.json")
    assert set(plan.free_io) == {name for name in shapes_of(small) if "past" in name or "present" in name}
    assert run("verify", "whole/model.onnx", "small/model.onnx") == 0
    assert run("apply", "whole/model.onnx", "small/model.onnx.plan.json", "-o", "again.onnx") == 0
    assert Path("again.onnx").read_bytes() == Path("small/model.onnx").read_bytes()


def test_a_wrong_list_of_kept_channels_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = pruned("--target", "params=0.6", *FEW)
    entry = next(entry for entry in small.metadata_props if entry.key == f"{PREFIX}x_past_0_key")
    axes = json.loads(entry.value)
    axis = next(iter(axes))
    axes[axis] = axes[axis][::-1]
    entry.value = json.dumps(axes)
    onnx.save(small, "small/model.onnx")
    assert run("verify", "whole/model.onnx", "small/model.onnx") != 0
    assert "x_past_0_key" in capsys.readouterr().err


def test_samples_of_the_original_feed_the_pruned_model_too(folder: Path) -> None:
    """Scores, repair, comparison of allocations, agreement and timing take the same samples for both."""
    words = ("--data", "data.npz", "--samples", 32, "--repair-samples", 32, "--max-loss", "inf", "--json", "r.json")
    small = pruned("--target", "params=0.6", "--effort", 2, *words)
    content = json.loads(Path("r.json").read_text())
    assert any("lost channels" in note for note in content["notes"])
    assert content["agreement"]["output"] == "y"
    with np.load("data.npz") as arrays:
        feed = {name: array[:2] for name, array in arrays.items()}
    session = open_model(small)
    whole = execute(session, feed)
    kept = kept_by(small)
    own = execute(session, {name: cut(array, kept.get(name, {})) for name, array in feed.items()})
    assert all(np.array_equal(a, b) for a, b in zip(whole, own, strict=True))
    assert run("bench", "whole/model.onnx", "small/model.onnx", "--data", "data.npz", "--seconds", 0.2) == 0
    assert run("verify", "whole/model.onnx", "small/model.onnx", "--data", "data.npz") == 0


def test_a_model_with_smaller_caches_is_trained(folder: Path) -> None:
    pytest.importorskip("torch")
    few = ("--samples", 32, "--repair-samples", 32, "--effort", 0, "--steps", 2, "--batch-size", 8, "--no-report")
    words = ("--free-io", "caches", "--target", "params=0.6", "--max-loss", "inf", "--no-check-speed", "--distill")
    assert run("compress", "whole/model.onnx", "-o", "small/model.onnx", "--data", "data.npz", *words, *few) == 0
    assert kept_by(load("small/model.onnx"))
    assert run("verify", "whole/model.onnx", "small/model.onnx") == 0


def test_a_shape_that_is_given_for_a_cache_is_that_of_the_original(folder: Path) -> None:
    shape = f"x_past_0_key:2,{HEADS},3,{SIZE}"
    small = pruned("--target", "params=0.6", "--input-shape", shape, *FEW)
    assert shapes_of(small)["x_past_0_key"] != [2, HEADS, 3, SIZE]
    assert run("verify", "whole/model.onnx", "small/model.onnx") == 0


def test_a_pattern_that_matches_nothing_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "whole/model.onnx", "--free-io", "memory*") != 0
    assert "--free-io 'memory*' matches none of the inputs and outputs: x, x_past_0_key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("config.json", {"num_key_value_heads": HEADS, "head_dim": SIZE}, {"num_key_value_heads": 2, "head_dim": SIZE}),
        ("config.json", {"n_head": HEADS, "n_embd": WIDTH}, {"n_head": 2, "n_embd": 2 * SIZE}),
        (
            "genai_config.json",
            {"model": {"decoder": {"num_attention_heads": 8, "num_key_value_heads": HEADS, "head_size": SIZE}}},
            {"model": {"decoder": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_size": SIZE}}},
        ),
        ("genai_config.json", {"model": {"decoder": []}}, {"model": {"decoder": []}}),
    ],
)
def test_configurations_name_the_sizes_of_the_caches(
    folder: Path, name: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    Path("whole", name).write_text(json.dumps(before))
    small = pruned("--target", "params=0.6", *HALF_OF_THE_HEADS, *FEW)
    assert shapes_of(small)["x_past_0_key"][1] == 2
    assert json.loads(Path("small", name).read_text()) == after
    assert json.loads(Path("whole", name).read_text()) == before
    assert (
        run(
            "prune", "whole/model.onnx", "-o", "whole/small.onnx", "--free-io", "caches", "--target", "params=0.6", *FEW
        )
        == 0
    )
    assert json.loads(Path("whole", name).read_text()) == before, "an input is never overwritten"


def test_the_models_of_a_sweep_share_no_configuration(folder: Path) -> None:
    Path("whole", "config.json").write_text(json.dumps({"num_key_value_heads": HEADS, "head_dim": SIZE}))
    words = (
        "--free-io",
        "caches",
        "--targets",
        "params=0.7,0.6",
        "--jobs",
        1,
        "--no-distill",
        "--no-repair",
        "--blind",
    )
    assert run("sweep", "whole/model.onnx", "-o", "sweep", *words) == 0
    assert all(kept_by(load(path)) for path in Path("sweep").glob("*.onnx"))
    assert len(list(Path("sweep").glob("*.onnx"))) == 2
    assert not Path("sweep", "config.json").exists()


@pytest.mark.parametrize("text", ["[1]", "{", '{"model": 3}'])
def test_a_configuration_that_cannot_be_read_costs_no_model(folder: Path, text: str) -> None:
    Path("whole", "genai_config.json").write_text(text)
    pruned("--target", "params=0.6", "--json", "r.json", *FEW)
    notes = json.loads(Path("r.json").read_text())["notes"]
    assert Path("small", "genai_config.json").exists() == text.endswith("}")
    assert any("genai_config.json was not written" in note for note in notes) != text.endswith("}")


def test_a_configuration_that_exists_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("whole", "small"):
        Path(place, "config.json").write_text("{}")
    asked = ("prune", "whole/model.onnx", "-o", "small/model.onnx", "--free-io", "caches", "--target", "params=0.6")
    assert run(*asked, *FEW) != 0
    assert "config.json" in capsys.readouterr().err
    shutil.rmtree("small")
    Path("small").mkdir()
    assert run(*asked, *FEW) == 0


def test_arrays_of_the_present_size_are_left_as_they_are() -> None:
    array = np.arange(12).reshape(3, 4)
    assert cut(array, {1: [0, 2]}).tolist() == [[0, 2], [4, 6], [8, 10]]
    assert cut(array, {1: [0, 1, 2, 3]}) is array
    assert cut(array, {0: [5, 7]}) is array, "the indices are not those of this array"
    assert cut(array, {2: [0]}) is array
