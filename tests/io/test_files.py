"""Files that cannot be read, or are not what they should be, are refused in one line by every reader of such files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpd_onnx.deploy.profiles import load_profile
from cpd_onnx.errors import CpdError, PlanError, TargetError
from cpd_onnx.report import manifest
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.requests import Prune

READERS: dict[str, tuple[Callable[[Path], Any], str, type[CpdError]]] = {
    "manifest": (manifest.read, "manifest {} is not JSON: ", PlanError),
    "plan": (load_plan, "plan {} is not JSON: ", PlanError),
    "profile": (load_profile, "{} is not a TOML file: ", TargetError),
    "recipe": (lambda path: recipe.read(path, Prune), "{} is not a TOML file: ", CpdError),
}
"""Readers by the kind of file, with what they say of other content, and the type of their errors."""
DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "content", [b"= {", b"\xff\xfe", f'a = {DEEP}"'.encode(), DEEP.encode(), b"a = " + b"1" * 5000]
)
def test_other_content_is_refused_with_its_reason(kind: str, content: bytes, tmp_path: Path) -> None:
    read, message, error = READERS[kind]
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read(path)
    assert type(caught.value) is error
    start = message.format(path)
    assert str(caught.value).startswith(start)
    assert len(str(caught.value)) > len(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("what", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(kind: str, what: str, tmp_path: Path) -> None:
    read, _, error = READERS[kind]
    path = tmp_path / "a.toml"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    with pytest.raises(error, match=f"^cannot read {kind} ") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert type(caught.value) is error
