"""All commands with a model among their inputs, for files that may be damaged."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

from cpd_onnx.cli.main import main
from tests.support.damage import damaged

_SMALL = "--data synthetic --samples 8"
_STEPS = "--data synthetic --steps 2 --batch-size 2 --threads 1"
COMMANDS = (
    "inspect MODEL --json made",
    f"inspect MODEL --sensitivity {_SMALL} --json made",
    f"prune MODEL -o made {_SMALL} --score fisher",
    f"prune MODEL -o made {_SMALL} --repair-samples 16",
    f"prune MODEL -o made {_SMALL} --score activation --spread isomorphic",
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


INCONCLUSIVE, WRONG = 4, 5
"""Exit codes of a proof; what was damaged may be anything, so that it may be proved wrong."""


def command_outcome(content: bytes, seed: int, folder: Path) -> str:
    """What one of the commands makes of a damaged file: "done", "refused", or what went wrong, in capitals.

    It must succeed, or say in one line what is wrong with the model, exit with 1, or with the code of a verdict, and leave nothing.
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
    _said(["prune", original, "-o", pruned, "--plan", plan, "--no-verify", "--force"])
    before = {path.name for path in folder.iterdir()}
    words = rng.choice(COMMANDS).split()
    code, said = _said([str(paths.get(word, folder / word if word.startswith("made") else word)) for word in words])
    command = " ".join(words)
    if code == 0:
        return "done"
    if code not in (1, INCONCLUSIVE, WRONG) or sum(line.startswith("error: ") for line in said.splitlines()) != 1:
        return f"EXIT CODE {code}, not one line: {command}: {said[-300:]}"
    if "error: internal error" in said:
        return f"DEFECT: {command}: {said[-300:]}"
    left = {path.name for path in folder.iterdir()} - before
    return f"LEFT {', '.join(left)}: {command}: {said[-300:]}" if left else "refused"


def _said(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as complaints:
        try:
            code = main(arguments)
        except SystemExit as stop:  # of argparse
            code = stop.code if isinstance(stop.code, int) else 2
    return code, complaints.getvalue()
