"""Language models whose caches are pruned, run by the programs that users run them with, against the masked original.

    python benchmarks/robustness/caches.py FOLDER ... [--prompts 8] [--tokens 48]
    python benchmarks/robustness/caches.py --table

FOLDER is what benchmarks/zoo/export_language.py writes. Each model is pruned by the command line to 0.6 of its parameters
with `--free-io caches`, without a repair, into a folder with the configuration that `prune` writes and the tokenizer of
the original. The masked original is the original with the removed channels set to zero, with its own configuration.
Both are run by onnxruntime-genai or optimum, which read the configuration: greedily, with caches, from the same random
prompts. Needs cpd-onnx, onnxruntime-genai and optimum-onnx in one environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpd_onnx.channels.combing import at_sizes
from cpd_onnx.ir.model import load
from cpd_onnx.proof.masking import is_bound_to_sizes, masked
from cpd_onnx.rewrite.plan import load_plan, planned
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.sessions import execute, open_model

RESULT = Path(__file__).resolve().parents[1] / "results" / "caches.json"
Tokens = list[int]
Opened = Callable[[Path, int], Callable[[Tokens], Tokens]]
PROMPT, END = 6, 2
"""Tokens of a prompt, and the token that ends a text, which is not generated before the number of tokens asked for."""


def by_genai(folder: Path, count: int) -> Callable[[Tokens], Tokens]:
    """Return the function that continues a prompt by onnxruntime-genai."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))

    def continued(prompt: Tokens) -> Tokens:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=PROMPT + count, min_length=PROMPT + count, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(np.asarray([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)]

    return continued


def by_optimum(folder: Path, count: int) -> Callable[[Tokens], Tokens]:
    """Return the function that continues a prompt by optimum."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)

    def continued(prompt: Tokens) -> Tokens:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return [int(token) for token in made[0]]

    return continued


class Masked:
    """The masked original of a pruned model."""

    def __init__(self, folder: Path, small: Path) -> None:
        self.folder = folder
        self.combed, self.keep = planned(folder / "model.onnx", load_plan(small / "model.onnx.plan.json"))
        self.pruned = rewrite(self.combed, self.keep).model

    def answers(self, target: Path, opened: Opened, tokens: int, given: list[Tokens]) -> list[Tokens]:
        """Return what follows the prompts that sequences of the pruned model begin with, written to a folder and run.

        Where channels are merged with positions, the masked original is one for each length; then the answers are the
        most likely tokens after each token of the sequences, which are run as a whole, without a cache.
        """
        if is_bound_to_sizes(self.combed, self.keep):
            return [[*sequence[:PROMPT], *self.next_tokens(sequence)[PROMPT - 1 : -1]] for sequence in given]
        shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns("*.onnx", "*.data"))
        masked(self.combed, self.keep, self.pruned).save(target / "model.onnx", weights="inside")
        continued = opened(target, tokens)
        return [continued(sequence[:PROMPT]) for sequence in given]

    def next_tokens(self, sequence: Tokens) -> Tokens:
        """Return the most likely token after each of a sequence."""
        length = len(sequence)
        here = at_sizes(self.combed, self.keep, {"batch_size": 1, "sequence_length": length, "past_sequence_length": 0})
        assert here is not None
        session = open_model(masked(*here, self.pruned))
        known = {
            "input_ids": np.asarray([sequence], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length)[None],
        }
        feed = {
            entry.name: known[entry.name] if entry.name in known else self.empty_cache(entry)
            for entry in session.get_inputs()
        }
        scores = execute(session, feed)[0][0]
        scores[:, END] = -np.inf
        return [int(token) for token in scores.argmax(-1)]

    def empty_cache(self, entry: Any) -> Any:
        """Return a cache of no positions."""
        _, heads, _, size = self.combed.folded.scope.values[entry.name].shape or ()
        kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[entry.type]
        return np.zeros((1, heads, 0, size), kind)


def row(folder: Path, count: int, tokens: int) -> dict[str, Any]:
    """Return how many tokens of a pruned model equal those of the masked original."""
    program = "genai" if (folder / "genai_config.json").is_file() else "optimum"
    opened = {"genai": by_genai, "optimum": by_optimum}[program]
    logits = next(info for info in load(folder / "model.onnx").graph.output if info.name == "logits")
    words = logits.type.tensor_type.shape.dim[-1].dim_value
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, words, PROMPT).tolist() for _ in range(count)]
    made: dict[str, Any] = {"model": folder.name, "program": program, "tokens": count * tokens}
    with tempfile.TemporaryDirectory() as work:
        reference, small = Path(work) / "masked", Path(work) / "small"
        small.mkdir()
        report = Path(work) / "result.json"
        options = ["--free-io", "caches", "--target", "params=0.6", "--blind", "--no-repair", "--no-check-speed"]
        paths = [folder / "model.onnx", "-o", small / "model.onnx", "--json", report]
        done = subprocess.run(
            [sys.executable, "-m", "cpd_onnx", "prune", *map(str, paths), *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip  # what and how
        if done.returncode not in (0, 3):
            return made | {"said": done.stderr.strip().splitlines()[-1]}
        content = json.loads(report.read_text())
        made |= {
            "params": content["after"]["params"] / content["before"]["params"],
            "verdict": content["verification"]["verdict"],
            "written": [note for note in content["notes"] if note.startswith("wrote")],
        }
        for path in folder.iterdir():
            if path.suffix == ".json" and not (small / path.name).exists():
                shutil.copy(path, small)
        try:
            continued = opened(small, tokens)
            found = [continued(prompt) for prompt in prompts]
            wanted = Masked(folder, small).answers(reference, opened, tokens, found)
        except Exception as error:  # the programs raise classes of their own
            return made | {"said": str(error).strip().splitlines()[0]}
        continued = opened(folder, tokens)
        whole = [continued(prompt) for prompt in prompts]
    made["equal"] = _equal(wanted, found) - count * PROMPT
    made["unchanged"] = _equal(whole, found) - count * PROMPT
    return made


def _equal(first: list[Tokens], second: list[Tokens]) -> int:
    return sum(a == b for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("| model | run by | parameters left | proof | tokens equal to the masked original's | to the original's |")
    print("|---|---|---|---|---|---|")
    for entry in rows:
        head = f"| {entry['model']} | {entry['program']} |"
        if "params" not in entry:
            print(f"{head} {entry['said']} | | | |")
            continue
        equal = f"{entry['equal']} of {entry['tokens']}" if "equal" in entry else entry["said"]
        print(f"{head} {entry['params']:.3f} | {entry['verdict']} | {equal} | {entry.get('unchanged', '')} |")


def main() -> None:
    """Prune, generate, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for folder in options.folders:
        made = row(folder, options.prompts, options.tokens)
        rows = [*(each for each in rows if each["model"] != made["model"]), made]
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(made["model"], made.get("equal"), made.get("said", ""), flush=True)
    show(rows)


if __name__ == "__main__":
    main()
