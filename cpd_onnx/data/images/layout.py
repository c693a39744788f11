"""What a folder of images contains: the images, and class folders, masks or boxes that label them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpd_onnx.data.images import boxes
from cpd_onnx.data.images.decoding import IMAGE_SUFFIXES
from cpd_onnx.data.signature import Array
from cpd_onnx.errors import DataError

TARGETS = ("masks", "annotations", "labels")
"""Names of folders beside the images that hold their masks or boxes."""
_IMAGES = "images"
"""Name of the folder of the images where one of `TARGETS` is beside it."""
_MASKS = frozenset({".png", ".bmp", ".tif", ".tiff"})
"""Suffixes of masks, which must be stored without loss."""
_AFTER = "_mask"
"""End of the stem of a mask that lies beside its image."""
_SHOWN = 5
"""Number of names in a message."""


@dataclass(frozen=True)
class ClassFolders:
    """Subfolders that name the classes of their images.

    Attributes:
        index: Class index by name of the subfolder.
        source: What the indices follow from: "number", "--classes" or "alphabet".
    """

    index: Mapping[str, int]
    source: str


@dataclass(frozen=True)
class Layout:
    """The images of a folder and what labels them; at most one of the last three is there.

    Attributes:
        files: The images, sorted.
        classes: Class folders.
        labels: Class index of each image, if there are class folders.
        masks: Mask of each image.
        boxes: Boxes [n, 5] of each image: left, upper, right and lower edge as fractions of the image, and the class.
        facts: Whole sentences about what was left out or assumed.
    """

    files: tuple[Path, ...]
    classes: ClassFolders | None = None
    labels: tuple[int, ...] = ()
    masks: tuple[Path, ...] = ()
    boxes: tuple[Array, ...] = ()
    facts: tuple[str, ...] = field(default=())

    def only(self, places: Sequence[int]) -> Layout:
        """Return the layout with the images at some places only."""
        chosen = {
            name: tuple(values[place] for place in places) if values else ()
            for name in ("files", "labels", "masks", "boxes")
            for values in (getattr(self, name),)
        }
        return Layout(classes=self.classes, facts=self.facts, **chosen)


def layout_of(folder: Path, classes: Path | None = None) -> Layout:
    """Return what a folder contains; `classes` is the file of --classes.

    With `images/` beside `masks/`, `annotations/` or `labels/`, or with one of these beside images, the images have
    masks or boxes of the same stem. Otherwise, images that are all in subfolders have their names as classes.

    Raises:
        DataError: There are no images, or labels are missing, ambiguous or malformed.
    """
    names = None if classes is None else class_names(classes)
    targets = [folder / name for name in TARGETS if (folder / name).is_dir()]
    inner = folder / _IMAGES
    base = inner if inner.is_dir() and _files(inner, IMAGE_SUFFIXES) else folder
    is_beside = base is inner or any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir())
    if targets and is_beside:
        skipped = () if base is inner else tuple(targets)
        files = [p for p in _files(base, IMAGE_SUFFIXES) if not any(p.is_relative_to(t) for t in skipped)]
        found = _with_targets(base, files, targets, names)
        if found is not None:
            return found
    else:
        files = _files(base, IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"folder {str(folder)!r} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return _beside(files) or _in_classes(base, files, names)


def class_names(path: Path) -> list[str]:
    """Return the names of the classes in a file, one a line; raises DataError for an unreadable or ambiguous one."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the classes {str(path)!r}: {error}; give a text file, one name a line") from error
    while names and not names[-1]:
        names.pop()
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice or not names:
        what = f"contains {twice[0]!r} twice" if twice else "is empty"
        raise DataError(f"--classes {path} {what}: give one name a line, in the order of the model's outputs")
    return names


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


# Class folders.


def _in_classes(base: Path, files: Sequence[Path], names: Sequence[str] | None) -> Layout:
    folders = [path.relative_to(base).parts[0] if path.parent != base else "" for path in files]
    if not all(folders):
        if names is not None:
            raise DataError(f"--classes names classes, but images such as {str(files[0])!r} are in no class folder")
        return Layout(tuple(files))
    classes = _indexed(sorted(set(folders)), names)
    if classes is None:
        return Layout(tuple(files))
    return Layout(tuple(files), classes, tuple(classes.index[name] for name in folders))


def _indexed(folders: Sequence[str], names: Sequence[str] | None) -> ClassFolders | None:
    """Return the class indices of folders; None if a single folder without a number says nothing."""
    is_numbered = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in folders)
    if names is not None:
        return ClassFolders(_named(folders, names), "--classes")
    if is_numbered:
        numbers = {name: int(name) for name in folders}
        if len(set(numbers.values())) < len(numbers):
            raise DataError(f"folders {', '.join(folders[:_SHOWN])} contain one number twice: rename one of them")
        return ClassFolders(numbers, "number")
    return ClassFolders({name: place for place, name in enumerate(folders)}, "alphabet") if len(folders) > 1 else None


def _named(folders: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Return the line of each folder's name: the whole line, its first word (as in synset lists), or its number."""
    index = {name: place for place, name in enumerate(names)}
    firsts = [name.split()[0].rstrip(",:") if name else "" for name in names]
    for place, word in enumerate(firsts):
        if word and firsts.count(word) == 1:
            index.setdefault(word, place)
    found = {name: index.get(name, int(name) if name.isascii() and name.isdecimal() else -1) for name in folders}
    unknown = [name for name, place in found.items() if not 0 <= place < len(names)]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} others" if len(unknown) > _SHOWN else ""
        listed = ", ".join(map(repr, unknown[:_SHOWN]))
        raise DataError(f"folders {listed}{more} are none of the {len(names)} names of --classes: add or rename them")
    return found


# Masks and boxes.


def _beside(files: Sequence[Path]) -> Layout | None:
    """Return images with masks of the same name but for `_mask` beside them; None if there are none."""
    stems = {path.parent / path.stem: path for path in files}
    masks = {path: key for key, path in stems.items() if path.stem.endswith(_AFTER)}
    of_image = {key.with_name(key.name.removesuffix(_AFTER)): path for path, key in masks.items()}
    images = [path for path in files if path not in masks]
    if not masks or not all(image in stems for image in of_image):
        return None
    return Layout(tuple(images), masks=_all_found(images, lambda p: of_image.get(p.parent / p.stem), f"x{_AFTER}.png"))


def _with_targets(
    base: Path, files: Sequence[Path], targets: Sequence[Path], names: Sequence[str] | None
) -> Layout | None:
    """Return images with what the first folder of targets holds for them; None if these folders hold nothing."""
    if not files:
        raise DataError(f"folder {str(base)!r} contains no images beside {targets[0].name}/")
    for folder in targets:
        found = (
            _with_masks(base, files, folder)
            or _with_json(base, files, folder, names)
            or _with_lines(base, files, folder)
        )
        if found is not None:
            return found
    return None


def _with_masks(base: Path, files: Sequence[Path], folder: Path) -> Layout | None:
    masks = {_key(path, folder): path for path in _files(folder, _MASKS)}
    if not masks:
        return None
    is_flat = len({path.name for path in masks}) == len(masks)
    flat = {path.name: mask for path, mask in masks.items()} if is_flat else {}
    found = _all_found(files, lambda p: masks.get(_key(p, base)) or flat.get(p.stem), f"{folder.name}/")
    return Layout(tuple(files), masks=found)


def _with_json(base: Path, files: Sequence[Path], folder: Path, names: Sequence[str] | None) -> Layout | None:
    described = _files(folder, (".json",))
    if not described:
        return None
    listed, found, facts = boxes.of_coco(described, files, base, names)
    return Layout(tuple(listed), boxes=tuple(found), facts=facts)


def _with_lines(base: Path, files: Sequence[Path], folder: Path) -> Layout | None:
    texts = {_key(path, folder): path for path in _files(folder, (".txt",))}
    lines = [texts.get(_key(path, base)) for path in files]
    empty = lines.count(None)
    if empty == len(files):
        return None
    fact = (f"images without a file in {folder.name}/, which count as empty: {empty}",)
    return Layout(tuple(files), boxes=tuple(map(boxes.of_yolo, lines)), facts=fact if empty else ())


def _key(path: Path, base: Path) -> Path:
    return path.relative_to(base).with_suffix("")


def _all_found(files: Sequence[Path], find: Callable[[Path], Path | None], where: str) -> tuple[Path, ...]:
    found = [find(path) for path in files]
    missing = [path.name for path, mask in zip(files, found, strict=True) if mask is None]
    if missing:
        listed = ", ".join(missing[:_SHOWN])
        raise DataError(
            f"{len(missing)} of {len(files)} images have no mask in {where}: {listed}; add masks or remove images"
        )
    return tuple(path for path in found if path is not None)


def padded(rows: Sequence[Array], most: int) -> Array:
    """Return boxes of several images as one array [images, most, 5]; class -1 marks unused rows."""
    made = np.full((len(rows), most, 5), -1, np.float32)
    for place, row in enumerate(rows):
        made[place, : len(row)] = row
    return made
