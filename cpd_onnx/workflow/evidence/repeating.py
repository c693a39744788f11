"""The scripts of an audit that check its files and repeat its runs: one for a POSIX shell, one for Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpd_onnx.errors import PlanError

_INSTALLED = (
    "cpd-onnx", "emx-onnx-cgen", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy", "torch", "torchmetrics",
)  # fmt: skip  # a list
"""Packages of a manifest that are installed in the versions that it names."""
_VERSION = re.compile(r"[\w.!-]+")


@dataclass(frozen=True)
class Command:
    """A command of a script.

    Attributes:
        words: Arguments of cpd-onnx; a word such as "$DATA" is the path that this variable holds.
        needs: Variables that must be set, and what they are to hold.
        repeats: Name of the file that is made again; empty for a check.
    """

    words: tuple[str, ...]
    needs: Mapping[str, str]
    repeats: str = ""


def pinned(versions: Mapping[str, str]) -> list[str]:
    """Return the requirements that install the versions of a manifest, without labels of local builds.

    Raises PlanError for what is not a version.

    >>> pinned({"cpd-onnx": "0.1.0", "torch": "2.9.0+cpu", "python": "3.11.7"})
    ['cpd-onnx==0.1.0', 'torch==2.9.0']
    """
    found = {name: versions[name].partition("+")[0] for name in _INSTALLED if name in versions}
    for name, version in found.items():
        if not _VERSION.fullmatch(version):
            raise PlanError(f"{version!r} is not a version of {name}")
    return [f"{name}=={version}" for name, version in found.items()]


def shell(commands: Sequence[Command], requirements: Sequence[str]) -> bytes:
    """Return the script for a POSIX shell."""
    needed = _needed(commands)
    lines = [
        "#!/bin/sh",
        "# Checks the SHA-256 of all files, verifies the model, and repeats its runs: sh repeat.sh",
        *(f"#   {name}=PATH: {_one_line(what)}" for name, what in needed.items()),
        "#   INSTALLED=1: use the cpd-onnx that is installed, instead of installing that of the runs",
        "# Arguments are passed on to cpd-onnx reproduce.",
        "set -eu",
        'absolute() { case "$1" in ""|/*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }',
        *(f'{name}=$(absolute "${{{name}:-}}")' for name in needed),
        'cd "$(dirname "$0")"',
        "sha256sum -c SHA256SUMS",
        "work=$(mktemp -d)",
        "trap 'rm -rf \"$work\"' EXIT",
        'if [ -z "${INSTALLED:-}" ]; then',
        '  python3 -m venv "$work/environment"',
        f'  "$work/environment/bin/pip" install -q {shlex.join(requirements)}',
        '  PATH="$work/environment/bin:$PATH"',
        "fi",
    ]
    for number, command in enumerate(commands, 1):
        line = f"cpd-onnx {' '.join(map(_quoted, command.words))}"
        line += f' -o "$work/{number}" "$@"' if command.repeats else ""
        if not command.needs:
            lines.append(line)
            continue
        test = " && ".join(f'[ -n "${name}" ]' for name in command.needs)
        said = shlex.quote(f"skipped, as it needs {', '.join(f'{name}=PATH' for name in command.needs)}: {line}")
        lines += [f"if {test}; then", f"  {line}", "else", f"  printf '%s\\n' {said}", "fi"]
    return ("\n".join(lines) + "\n").encode()


def _quoted(word: str) -> str:
    return f'"{word}"' if word.startswith("$") and word[1:].isidentifier() else shlex.quote(word)


def _needed(commands: Sequence[Command]) -> dict[str, str]:
    return {name: what for command in commands for name, what in command.needs.items()}


_PYTHON = '''"""Checks the SHA-256 of all files, verifies the model, and repeats its runs: python repeat.py

Environment variables: {needed}INSTALLED=1 uses the cpd-onnx that is
installed, instead of installing that of the runs. Arguments are passed on to cpd-onnx reproduce.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = {requirements}
COMMANDS = {commands}
NEEDED = {names}


def main():
    paths = {{"$" + name: os.path.abspath(os.environ[name]) for name in NEEDED if os.environ.get(name)}}
    os.chdir(Path(__file__).resolve().parent)
    for line in Path("SHA256SUMS").read_text("utf-8").splitlines():
        check(line)
    with tempfile.TemporaryDirectory() as work:
        program = [sys.executable, "-P", "-m", "cpd_onnx"]
        if not os.environ.get("INSTALLED"):
            venv.create(work + "/environment", with_pip=True)
            folder = Path(work) / "environment" / ("Scripts" if os.name == "nt" else "bin")
            subprocess.run([folder / "python", "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
            program[0] = str(folder / "python")
        for number, (words, needs, is_run) in enumerate(COMMANDS, 1):
            missing = [name + "=PATH" for name in needs if "$" + name not in paths]
            if missing:
                print("skipped, as it needs", ", ".join(missing) + ":", *words, flush=True)
                continue
            output = ["-o", f"{{work}}/{{number}}", *sys.argv[1:]] if is_run else []
            subprocess.run([*program, *(paths.get(word, word) for word in words), *output], check=True)


def check(line):
    sha256, name = line.lstrip("\\\\").split("  ", 1)
    if line.startswith("\\\\"):
        for escaped, letter in (("\\\\n", "\\n"), ("\\\\r", "\\r"), ("\\\\\\\\", "\\\\")):
            name = name.replace(escaped, letter)
    with open(name, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"{{name}}: {{'OK' if found == sha256 else 'FAILED'}}", flush=True)
    if found != sha256:
        sys.exit(f"{{name}} has changed: its SHA-256 must be {{sha256}}")


main()
'''


def python(commands: Sequence[Command], requirements: Sequence[str]) -> bytes:
    """Return the script for Python."""
    needed = _needed(commands)
    rows = [(list(command.words), list(command.needs), bool(command.repeats)) for command in commands]
    listed = ",\n".join(f"    ({words!r}, {needs!r}, {is_run})" for words, needs, is_run in rows)
    return _PYTHON.format(
        needed="".join(f"{name}=PATH, {_one_line(what)}; " for name, what in needed.items()),
        requirements=repr(list(requirements)),
        commands=f"[\n{listed},\n]" if listed else "[]",
        names=repr(list(needed)),
    ).encode()


def _one_line(text: str) -> str:
    """Return text that can stand in a comment or a docstring."""
    return "".join(letter if letter.isprintable() and letter not in "\\\"'" else " " for letter in text)
