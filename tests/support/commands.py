"""All commands that read a model, run on files that may be damaged."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

from cpd_onnx.cli.main import main
from tests.support.damage import damaged
from tests.support.runs import plain

_SMALL = "--data synthetic --samples 8"
_STEPS = "--data synthetic --steps 2 --batch-size 2 --threads 1"
COMMANDS = (
    "inspect MODEL --json made",
    f"inspect MODEL --sensitivity {_SMALL} --json made",
    f"prune MODEL -o made {_SMALL} --score fisher",
    f"prune MODEL -o made {_SMALL} --repair-samples 16",
    f"prune MODEL -o made {_SMALL} --score activation --policy isomorphic",
    "prune MODEL -o made --target latency=0.7",
    "deploy MODEL -o made --opset 21",
    "deploy MODEL -o made --batch 1 --ort made.ort",
    f"deploy MODEL -o made --int8 {_SMALL}",
    "deploy MODEL -o made --half float16",
    f"distill MODEL ORIGINAL -o made {_STEPS}",
    f"distill ORIGINAL MODEL -o made {_STEPS}",
    f"distill MODEL MODEL -o made {_STEPS}",
    f"compress MODEL -o made --samples 8 --repair-samples 16 {_STEPS} --target macs=0.7",
    "apply MODEL PLAN -o made",
    "verify ORIGINAL MODEL --plan PLAN",
    "verify MODEL ORIGINAL --plan PLAN",
    "bench MODEL --seconds 0.1",
    "latency MODEL -o made",
)


NOT_FASTER, NOT_AS_GOOD, WRONG, TARGET_MISSED = 3, 4, 5, 6
"""Exit codes of a verdict; a damaged file may be a valid model that is written though the verdict is 4 or 6, or that the
proof finds wrong."""
_UNCHANGED = 0.25
"""Share of the commands that run with their default options, which measure and bound."""


def command_outcome(content: bytes, seed: int, folder: Path) -> str:
    """Run one of the commands on a damaged file; return "done", "refused", or the failure in capitals.

    The command must write what it made, or print one line with the error, exit with 1 or with the code of a verdict, and
    leave no files.
    """
    rng = random.Random(seed)
    names = {"MODEL": "damaged.onnx", "ORIGINAL": "original.onnx", "PLAN": "plan.json"}
    paths = {word: folder / name for word, name in names.items()}
    paths["ORIGINAL"].write_bytes(content)
    paths["MODEL"].write_bytes(damaged(content, rng))
    paths["PLAN"].write_text("{}")
    for path in folder.glob("made*"):
        path.unlink()
    original, plan, pruned = str(paths["ORIGINAL"]), str(paths["PLAN"]), str(folder / "pruned.onnx")
    _run(plain(["prune", original, "-o", pruned, "--plan", plan, "--no-verify", "--force"]))
    before = {path.name for path in folder.iterdir()}
    words = rng.choice(COMMANDS).split()
    words = words if rng.random() < _UNCHANGED else plain(words)
    code, message = _run([str(paths.get(word, folder / word if word.startswith("made") else word)) for word in words])
    command = " ".join(words)
    errors = sum(line.startswith("error: ") for line in message.splitlines())
    if code == 0 or (code in (NOT_AS_GOOD, TARGET_MISSED) and not errors):
        return "done"
    if code not in (1, NOT_FASTER, NOT_AS_GOOD, WRONG) or errors != 1:
        return f"EXIT CODE {code}, not one line: {command}: {message[-300:]}"
    if "error: internal error" in message:
        return f"DEFECT: {command}: {message[-300:]}"
    left = {path.name for path in folder.iterdir()} - before
    return f"LEFT {', '.join(left)}: {command}: {message[-300:]}" if left else "refused"


def _run(arguments: list[str]) -> tuple[int, str]:
    """Run a command and return its exit code and standard error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as complaints:
        try:
            code = main(arguments)
        except SystemExit as stop:  # of argparse
            code = stop.code if isinstance(stop.code, int) else 2
    return code, complaints.getvalue()
