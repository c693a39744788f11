"""Configuration files beside a language model that name the sizes of its caches, which programs allocate by them.

onnxruntime-genai reads `genai_config.json`, transformers and optimum `config.json`. If a model whose caches lose
channels is written to another folder, they are written there too, with the new sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpd_onnx.io.files import read_json, require_free, write_atomically
from cpd_onnx.ir.interface import Kept, kept_by
from cpd_onnx.ir.model import Model

_NAMES = ("genai_config.json", "config.json")
_RANK, _HEADS = 4, 1
"""Rank of a cache [batch, heads, …], and its axis of the heads; the other axis that may lose channels is a head's."""
_KEYS = {
    "heads": ("num_key_value_heads", "num_kv_heads"),
    "queries": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}
"""Names of the number of heads of keys and values, of all heads, and of the hidden size; without the first, the second
is that of keys and values too."""
_HEAD_SIZE = {"genai_config.json": "head_size", "config.json": "head_dim"}
"""Name of the size of a head, by file."""


def places_of(original: Path, output: Path) -> list[Path]:
    """Return where configuration files will be written: beside the output, if it is not beside the original."""
    if original.parent.resolve() == output.parent.resolve():
        return []
    return [output.parent / name for name in _NAMES if (original.parent / name).is_file()]


def write(original: Path, output: Path, model: Model, *, overwrite: bool = False) -> list[str]:
    """Write the configuration files beside the original with the sizes of the caches of a pruned model.

    Returns a sentence for each, or one that says what they cannot express; empty if no cache has lost channels.
    """
    kept = {name: axes for name, axes in kept_by(model).items() if _rank_of(model, name) == _RANK}
    heads, size = (_sizes_of(kept, is_heads=is_heads) for is_heads in (True, False))
    places = places_of(original, output) if heads or size else []
    sentences = []
    for path in places:
        if len(heads) > 1 or len(size) > 1:
            found = " and ".join(map(str, sorted(heads if len(heads) > 1 else size)))
            sentences.append(f"{path.name} was not written: it has one size for all caches, and these have {found}")
            continue
        content = _read(original.parent / path.name)
        if content is None:
            sentences.append(f"{path.name} was not written: that of the original is not a JSON object")
            continue
        changed = dict(_changes(path.name, content, next(iter(heads), None), next(iter(size), None)))
        require_free(path, overwrite=overwrite)
        write_atomically(path, (json.dumps(content, indent=4) + "\n").encode())
        words = ", ".join(f"{name} {value}" for name, value in changed.items())
        sentences.append(f"wrote {path} for the new caches: {words}")
    return sentences


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if it cannot be read: the result of a long run does not depend on it."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _rank_of(model: Model, name: str) -> int:
    infos = (*model.graph.input, *model.graph.output)
    return next((len(info.type.tensor_type.shape.dim) for info in infos if info.name == name), 0)


def _sizes_of(kept: Kept, *, is_heads: bool) -> set[int]:
    """Return how many heads the caches keep, or how many channels of a head: one number if all are alike."""
    return {len(at) for axes in kept.values() for axis, at in axes.items() if (axis == _HEADS) == is_heads}


def _changes(name: str, content: dict[str, Any], heads: int | None, size: int | None) -> Iterator[tuple[str, int]]:
    """Set the sizes in the content of a file, and yield them.

    Some programs divide the hidden size by the number of heads to get the size of a head, so that both fit afterwards.
    """
    part: dict[str, Any] = content
    for key in ("model", "decoder") if name == _NAMES[0] else ():
        part = part[key] if isinstance(part.get(key), dict) else {}
    names = {role: next((key for key in keys if isinstance(part.get(key), int)), "") for role, keys in _KEYS.items()}
    queries, hidden = (part.get(names[role], 0) for role in ("queries", "hidden"))
    before = part.get(_HEAD_SIZE[name])
    changes: dict[str, int] = {}
    if heads is not None:
        changes[names["heads"] or names["queries"] or _KEYS["heads"][0]] = heads
    if size is not None:
        changes[_HEAD_SIZE[name]] = size
    if queries > 0 and hidden and before in (None, hidden // queries):
        each = changes.get(_HEAD_SIZE[name], hidden // queries)
        changes[names["hidden"]] = changes.get(names["queries"], queries) * each
    for key, value in changes.items():
        if part.get(key) != value:
            part[key] = value
            yield key, value
