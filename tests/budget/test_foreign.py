"""Cost tables from times of layers on another device."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.foreign import WHOLE, layers_of, table_from, template
from cpd_onnx.budget.latency import CostTable, load_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli.main import main
from cpd_onnx.runtime.bench import Setting
from tests.support.models import from_text
from tests.support.runs import plain

STACK = (
    "(float[N, 3, 16, 16] x, float[96, 3, 3, 3] w, float[128, 96, 3, 3] u, float[64, 128, 3, 3] t, float[1024, 10] v) => (float[N, 10] y) "
    "{ a = Conv(x, w) r = Relu(a) b = Conv(r, u) c = Conv(b, t) p = MaxPool<kernel_shape=[3, 3], strides=[2, 2]>(c) f = Flatten(p) y = MatMul(f, v) }"
)


@pytest.fixture(scope="module")
def combed() -> Combed:
    return comb(from_text(STACK))


def cost(layer: str, into: int, out: int) -> float:
    """Milliseconds of a layer on a device that was made up: a constant, and parts that follow its widths."""
    return {
        "a": 0.5 + 0.01 * out,
        "b": 0.25 + 0.001 * into * out,
        "c": 0.002 * into + 0.0005 * into * out,
        "y": 0.1 + 0.001 * into,
        "r": 0.003 * out,
    }[layer]


def filled(text: str, whole: float | None) -> str:
    rows = list(csv.DictReader(text.splitlines()))
    lines = ["layer,operator,input_channels,output_channels,ms"]
    for row in rows:
        into, out = (int(row[name] or 0) for name in ("input_channels", "output_channels"))
        ms = whole if row["layer"] == WHOLE else cost(row["layer"], into, out)
        if ms is not None:
            lines.append(f"{row['layer']},{row['operator']},{row['input_channels']},{row['output_channels']},{ms!r}")
    return "\n".join(lines) + "\n"


def predicted(table: CostTable, combed: Combed, widths: list[int]) -> float:
    gone = np.concatenate([g.channels[width:] for g, width in zip(combed.groups, widths, strict=True)])
    kept = KeepMask(combed.atoms, gone)
    return sum(factor * np.prod([kept.count(axis) for axis in axes]) for factor, axes, *_ in table.terms(combed))


def test_the_template_lists_the_layers_and_the_widths(combed: Combed) -> None:
    rows = list(csv.DictReader(template(combed).splitlines()))
    assert list(dict.fromkeys(row["layer"] for row in rows)) == ["a", "b", "c", "y", WHOLE]
    assert [row["output_channels"] for row in rows if row["layer"] == "a"] == ["96", "72", "48", "24"]
    assert len([row for row in rows if row["layer"] == "b"]) == 9
    into = [int(row["input_channels"]) for row in rows if row["layer"] == "y"]
    assert [size / into[0] for size in into] == [1, 0.75, 0.5, 0.25]
    assert template(combed) == template(comb(from_text(STACK)))


@pytest.mark.parametrize("widths", [[96, 128, 64], [40, 56, 24], [8, 128, 16]])
def test_times_of_a_known_cost_give_a_table_that_predicts_it(combed: Combed, tmp_path: Path, widths: list[int]) -> None:
    path = tmp_path / "t.csv"
    path.write_text(filled(template(combed), 30.0))
    table = table_from(combed, path, Setting(), "a phone")
    unit = layers_of(combed)["y"].axes["input_channels"].shape[0] // 64
    full, made = (
        cost("a", 0, a) + cost("b", a, b) + cost("c", b, c) + cost("y", unit * c, 0)
        for a, b, c in ([96, 128, 64], widths)
    )
    assert table.ms == pytest.approx(30.0)
    assert predicted(table, combed, widths) == pytest.approx(30.0 - full + made, rel=1e-6)
    assert {group.name: group.multiple for group in table.groups} == {"w": 8, "u": 32, "t": 16}
    assert table.machine["source"] == "a phone"
    assert all(kernel.error < 1e-6 for kernel in table.kernels)


def test_widths_of_groups_instead_of_channels(combed: Combed, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = ["layer,w,u,t,ms"]
    for a, b, c in ((96, 128, 64), (48, 64, 32), (48, 128, 64), (96, 64, 32), (96, 128, 32)):
        lines += [f"a,{a},,,{cost('a', 0, a)}", f"b,{a},{b},,{cost('b', a, b)}", f"c,,{b},{c},{cost('c', b, c)}"]
        lines += [f"y,,,{c},{0.1 + 0.01 * c}", f"r,{a},,,{cost('r', 0, a)}"]
    path.write_text("\n".join(lines) + "\n")
    table = table_from(combed, path, Setting())
    wanted = cost("a", 0, 64) + cost("b", 64, 96) + cost("c", 96, 48) + 0.1 + 0.48 + cost("r", 0, 64)
    assert predicted(table, combed, [64, 96, 48]) == pytest.approx(wanted, rel=1e-6)
    assert table.rest == 0
    assert table.machine["source"] == "t.csv"


def edited(change: Callable[[str], str]) -> Callable[[Combed], str]:
    return lambda combed: change(filled(template(combed), None))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (edited(lambda text: text.replace("layer,", "node,")), "has no column 'layer'"),
        (edited(lambda text: text.replace("input_channels", "input_chanels")), "did you mean input_channels"),
        (edited(lambda text: text.replace("\na,", "\nconv1,")), "line 2: the model has no prunable layer 'conv1'"),
        (
            edited(lambda text: "\n".join(x for x in text.splitlines() if x[0] not in "bc")),
            "has no times of layers 'b', 'c'",
        ),
        (edited(lambda text: text + "a,Conv,,0,1\n"), "output_channels is '0'"),
        (edited(lambda text: text + "a,Conv,,97,1\n"), "'a' has 96 output channels, not 97"),
        (edited(lambda text: text + "a,Conv,,,1\n"), "'a' needs output_channels, or the width of group 'w'"),
        (edited(lambda text: text + "a,Conv,,8,\n"), "ms is ''"),
        (edited(lambda text: text + "a,Conv,,8,-1\n"), "ms is '-1'"),
        (
            edited(lambda text: "\n".join(x for x in text.splitlines() if x[0] != "a" or ",96," in x)),
            "all times of 'a' are for 96",
        ),
        (lambda combed: template(combed), "ms is ''"),
        (lambda _: "", "has no column"),
        (lambda _: "layer,w,ms\na,97,1\n", "has no times of"),
    ],
)
def test_what_is_no_table_of_times(tmp_path: Path, combed: Combed, content: Callable[[Combed], str], said: str) -> None:
    (tmp_path / "t.csv").write_text(content(combed))
    with pytest.raises(cpd.DataError) as caught:
        table_from(combed, tmp_path / "t.csv", Setting())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_widths_beyond_a_group(tmp_path: Path, combed: Combed) -> None:
    rows = filled(template(combed), None).replace("layer,", "w,layer,").replace("\n", "\n,").rstrip(",")
    (tmp_path / "t.csv").write_text(f"{rows}97,a,Conv,,,1\n")
    with pytest.raises(cpd.DataError, match="group 'w' has 96 channels, not 97"):
        table_from(combed, tmp_path / "t.csv", Setting())


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(from_text(STACK), "m.onnx")
    assert main(["latency", "m.onnx", "--template", "t.csv"]) == 0
    Path("f.csv").write_text(filled(Path("t.csv").read_text(), None))
    assert main(["latency", "m.onnx", "-o", "t.json", "--timings", "f.csv", "--source", "phone"]) == 0
    assert "phone" in capsys.readouterr().out
    assert load_table(Path("t.json")).machine["source"] == "phone"
    assert (
        main(plain(["prune", "m.onnx", "-o", "s.onnx", "--blind", "--target", "latency=0.5", "--cost-table", "t.json"]))
        == 0
    )
    assert "by the cost table (phone), not measured here" in capsys.readouterr().out
    assert Path("s.onnx").stat().st_size < Path("m.onnx").stat().st_size
    assert main(["latency", "m.onnx"]) == 1
    assert main(["latency", "m.onnx", "-o", "t.json", "--template", "u.csv"]) == 1
    assert main(["latency", "m.onnx", "-o", "u.json", "--source", "phone"]) == 1
    assert main(["latency", "m.onnx", "-o", "u.json", "--timings", "none.csv"]) == 1
    assert not Path("u.json").exists()
    assert len(capsys.readouterr().err.splitlines()) == 4
