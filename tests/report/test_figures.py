"""Figures: the same result gives the same file, and what cannot be drawn is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import pytest

pytest.importorskip("matplotlib")

import matplotlib  # after the check for it

import cpd_onnx as cpd
from cpd_onnx.cli.main import main
from cpd_onnx.report import figures as plots
from cpd_onnx.runtime.bench import Bench, Setting, Timing
from tests.support.models import from_text
from tests.support.runs import plain

SETTINGS = tuple(Setting(batch, threads) for batch in (1, 8) for threads in (1, 2))
MACHINE = {"cpus": 2, "processor": "one", "system": "some", "onnxruntime": "1.0"}
Draw: TypeAlias = Callable[[Path, bool], None]


def found(settings: tuple[Setting, ...]) -> Bench:
    timings = [
        Timing(name, s, 0.9 * ms, ms, 1.2 * ms, 30 * ms, 1e3 * (s.batch or 4) / ms, 50, ms)
        for s in settings
        for name, ms in (("first.onnx", 1.0), ("second.onnx", 0.5))
    ]
    profiles = {"first.onnx": {f"Op{k}": 1 / (k + 1) for k in range(12)}, "second.onnx": {"Op0": 0.5}}
    return Bench(tuple(timings), {"first.onnx": 20.0, "second.onnx": 11.5}, profiles, settings[0], MACHINE)


def curves(groups: int) -> dict[str, list[tuple[int, float]]]:
    return {f"layer{k}": [(w, k + float(np.exp(-w / 4))) for w in (2, 4, 8)] for k in range(groups)}


def benched(*settings: Setting) -> Draw:
    return lambda path, overwrite: plots.bench(found(settings)).write(path, overwrite=overwrite)


def sensed(groups: int) -> Draw:
    return lambda path, overwrite: plots.sensitivity(curves(groups), "error").write(path, overwrite=overwrite)


DRAWINGS: dict[str, tuple[Draw, tuple[str, ...]]] = {
    "all settings": (benched(*SETTINGS), ("first.onnx", "second.onnx", "batch 8, 2 threads", "the others", "Op6")),
    "one setting": (benched(Setting()), ("first.onnx", "samples at a time", "20.0")),
    "threads": (benched(*SETTINGS[:2]), ("threads", "2")),
    "one group": (sensed(1), ("layer0", "channels left", "error")),
    "some groups": (sensed(5), ("layer0", "layer4")),
    "many groups": (sensed(30), ("layer29", "fraction of the group's channels left", "error")),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_same_result_gives_the_same_file(name: str, tmp_path: Path) -> None:
    draw, words = DRAWINGS[name]
    draw(tmp_path / "a.svg", False)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):  # what a user likes
        draw(tmp_path / "b.svg", False)
        assert matplotlib.rcParams["font.size"] == 30
    text = (tmp_path / "a.svg").read_text()
    assert (tmp_path / "b.svg").read_text() == text
    assert "dc:date" not in text
    assert [word for word in words if f"<!-- {word} -->" not in text] == []


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_other_kinds_of_files(suffix: str, start: bytes, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        plots.bench(found(SETTINGS[:1])).write(file)
    assert files[0].read_bytes().startswith(start)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cpd.UnsupportedError, match=r"must end in \.svg, \.png, \.pdf, got"):
        plots.bench(found(SETTINGS)).write(tmp_path / "a.jpg")
    plots.sensitivity(curves(2), "error").write(tmp_path / "a.svg")
    with pytest.raises(cpd.ModelError, match="exists"):
        plots.sensitivity(curves(2), "error").write(tmp_path / "a.svg")
    with pytest.raises(ValueError, match="points"):
        plots.sensitivity({"layer": []}, "error")
    monkeypatch.setattr(plots.util, "find_spec", lambda name: None)
    with pytest.raises(cpd.UnsupportedError, match=r"pip install 'cpd-onnx\[report\]'"):
        plots.require(tmp_path / "b.svg")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "(float[N, 8] x, float[8, 4] w) => (float[N, 4] y) { y = MatMul(x, w) }"
    onnx.save(from_text(text), model := tmp_path / "model.onnx")
    figure = tmp_path / "figure.svg"
    line = ["bench", str(model), "--seconds", "0.05", "--plot", str(figure)]
    assert main(line) == 0
    assert f"wrote {figure}" in capsys.readouterr().out
    assert "<!-- model.onnx -->" in figure.read_text()
    assert main(line) == 1
    assert "exists" in capsys.readouterr().err
    assert main(plain([*line, "--force", "--json", str(figure)])) == 1
    assert "is given for two outputs" in capsys.readouterr().err


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, cpd_onnx, cpd_onnx.cli.main; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
