"""Boxes of objects in annotation files: one text file an image (YOLO), or JSON for all (COCO)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpd_onnx.data.signature import Array
from cpd_onnx.errors import DataError

_SHOWN = 5
"""Number of names in a message."""


def of_yolo(path: Path | None) -> Array:
    """Return the boxes [n, 5] of lines `class x y width height`, or of outlines `class x y x y …`, as fractions.

    Columns of the result are left, upper, right and lower edge, and the class. Without a file there are none.
    """
    if path is None:
        return np.zeros((0, 5), np.float64)
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                rows.append(_of_line([float(word) for word in line.split()]))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} has no lines of class, x, y, width and height (YOLO): {error}") from error
    return np.array(rows, np.float64).reshape(-1, 5)


def _of_line(values: Sequence[float]) -> tuple[float, ...]:
    label, *places = values
    if label < 0 or label != int(label) or not np.isfinite(values).all():
        raise ValueError(f"{label:g} is not the index of a class")
    if len(places) == 4:
        x, y, width, height = places
        edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(places) >= 6 and len(places) % 2 == 0:
        edges = (min(places[::2]), min(places[1::2]), max(places[::2]), max(places[1::2]))
    else:
        raise ValueError(f"a line has {len(values)} numbers")
    if max(map(abs, edges)) > 2:
        raise ValueError("the places are not fractions of the image")
    return (*edges, label)


def of_coco(
    paths: Sequence[Path], files: Sequence[Path], base: Path, names: Sequence[str] | None
) -> tuple[list[Path], list[Array], tuple[str, ...]]:
    """Return the images that JSON files describe, their boxes as `of_yolo` gives them, and facts for the user.

    The class is the place of the category in the order of the ids, or that of its name in `names`.
    """
    contents = [content for path in paths if (content := _read(path)) is not None]
    if not contents:
        shown = ", ".join(path.name for path in paths[:_SHOWN])
        raise DataError(f"none of {shown} is a COCO file with images, annotations with bbox, and categories")
    by_name = {path.relative_to(base).as_posix(): path for path in files} | {path.name: path for path in files}
    found: dict[Path, Array] = {}
    try:
        for content in contents:
            for path, boxes in _described(content, by_name, names):
                if path in found:
                    raise DataError(f"image {path.name!r} is in two of the annotation files: keep one of them")
                found[path] = boxes
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{paths[0].parent.name}/*.json is not in COCO's format: {error!r} in an entry") from error
    if not found:
        raise DataError(f"the annotations describe none of the {len(files)} images, such as {files[0].name!r}")
    listed = sorted(found)
    left = len(files) - len(listed)
    facts = [f"left out because the annotations do not list them: {left}"] if left else []
    return listed, [found[path] for path in listed], tuple(facts)


def _read(path: Path) -> Mapping[str, Any] | None:
    """Return a COCO file with boxes; None for another, such as captions."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        return None
    has_boxes = isinstance(content["annotations"], list) and all("bbox" in a for a in content["annotations"][:1])
    return content if has_boxes else None


def _described(
    content: Mapping[str, Any], by_name: Mapping[str, Path], names: Sequence[str] | None
) -> list[tuple[Path, Array]]:
    places = {entry["id"]: place for place, entry in enumerate(sorted(content["categories"], key=lambda c: c["id"]))}
    if names is not None:
        unknown = [entry["name"] for entry in content["categories"] if entry["name"] not in names]
        if unknown:
            raise DataError(f"categories {', '.join(map(repr, unknown[:_SHOWN]))} are no names of --classes: add them")
        places = {entry["id"]: names.index(entry["name"]) for entry in content["categories"]}
    of_image: dict[Any, list[tuple[float, ...]]] = {}
    for entry in content["annotations"]:
        if not entry.get("iscrowd"):
            left, top, width, height = map(float, entry["bbox"])
            of_image.setdefault(entry["image_id"], []).append(
                (left, top, left + width, top + height, float(places[entry["category_id"]]))
            )
    found = []
    for entry in content["images"]:
        path = by_name.get(entry["file_name"]) or by_name.get(Path(entry["file_name"]).name)
        if path is not None:
            size = np.array([entry["width"], entry["height"]] * 2 + [1.0])
            found.append((path, np.array(of_image.get(entry["id"], []), np.float64).reshape(-1, 5) / size))
    return found
