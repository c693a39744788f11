"""Is the answer "as good?" at the end of a default run true? Checked on labelled test data that the run never saw.

    python benchmarks/accuracy/verdicts.py --data-folder DATA [--model NAME=FILE] [--only NAME] [--command compress]
    python benchmarks/accuracy/verdicts.py --table

DATA is a folder with `onnx/` and `load.py`, which decodes CIFAR-10, GTSRB, CamVid and 1,500 images of ImageNet; models and
data that are missing are skipped. Each run gets unlabelled training images as PNG files, the preprocessing of its model
and otherwise default options. This file scores the original and the result with onnxruntime and numpy only.

An answer is right if

- "yes": on other images of the same source, which the run never saw, at least 1 - bound of the answers are the
  original's, the lower bound that was stated holds within their sampling error (one-sided, 95 %), and the labelled score
  lost at most the bound;
- "no": fewer than 1 - bound of the answers are the original's, or the labelled score lost more;
- "unknown": the interval of the judged samples contains 1 - bound, or nothing was held out.

The other images are the rest of the training images, of which the run got some. The labelled score is that of the test
images, which may be of another kind: those of CamVid show other drives, so that the answers on them may differ more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "verdicts.json"
BOUND = 0.1
"""Fraction of the answers that may differ from the original's by default."""
SURE = 1.645
"""Standard errors of a one-sided bound at 95 %."""
SEED = 7
OTHERS = 2000
"""Most images of the same source on which answers are compared."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pixels:
    """What is fed for a pixel x of 0..255: (x * scale - mean) / std, with the options that say so."""

    options: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    order: str = "RGB"

    def __call__(self, images: Array, *, is_last: bool = False) -> Array:
        """Return images [N, H, W, C] as the input of a model, [N, C, H, W] or as they are if channels come last."""
        x = images[..., ::-1] if self.order == "BGR" else images
        values = (x.astype(np.float32) * np.float32(self.scale) - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(values if is_last else values.transpose(0, 3, 1, 2))


PLAIN = Pixels(("--preset", "0-1"))
IMAGENET = Pixels(("--preset", "imagenet"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ESPNET_MEAN, ESPNET_STD = (110.33139, 108.40919, 105.03353), (72.125206 * 255, 72.68849 * 255, 69.902596 * 255)
ESPNET = Pixels(
    (
        *("--image-order", "BGR", "--image-scale", "1", "--image-mean", ",".join(map(str, ESPNET_MEAN))),
        *("--image-std", ",".join(map(str, ESPNET_STD))),
    ),
    ESPNET_MEAN, ESPNET_STD, 1.0, "BGR",
)  # fmt: skip  # what and how
LITE = Pixels(("--image-scale", "1", "--image-mean", "127", "--image-std", "128"), (127.0,), (128.0,), 1.0)
OPENVINO = Pixels(("--preset", "0-255", "--image-order", "BGR"), scale=1.0, order="BGR")
# Classes of Cityscapes as those of CamVid; -1 for the background, which CamVid lacks.
CITY = np.array([3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10, -1])
ROAD = 3
"""Class of the road in CamVid."""


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        model: Stem of the file in DATA/onnx.
        data: Name of the data set.
        pixels: Preprocessing.
        counts: Numbers of unlabelled images, each of which is a run.
        score: "top1", "miou", or "road": intersection over union of the road.
        size: Height and width that images are resized to before they are written; None for those of the data set.
        classes: Class of CamVid for each class of the model; None where they are the same.
    """

    model: str
    data: str
    pixels: Pixels
    counts: tuple[int, ...] = (512,)
    score: str = "top1"
    size: tuple[int, int] | None = None
    classes: Array | None = None


CASES = (
    Case("resnet20_gtsrb", "gtsrb", IMAGENET, (3, 10, 30, 100, 300, 512)),
    Case("digits", "digits", PLAIN),
    Case("cntk_mnist", "digits", PLAIN, size=(28, 28)),
    Case("resnet20_jpeg_cifar10", "cifar10", IMAGENET),
    Case("resnet20_cifar10", "cifar10", IMAGENET),
    Case("resnet20_cifar10_bnfold", "cifar10", IMAGENET),
    Case("vit_cifar10_smmk47", "cifar10", IMAGENET),
    Case("espnet_p2_q8_camvid", "camvid", ESPNET, (150,), "miou"),
    Case("twinlitenet", "camvid", PLAIN, (150,), "road", (320, 320)),
    Case("espnetv2_s0.5_city", "camvid", IMAGENET, (150,), "miou", (256, 512), CITY),
    Case("dicenet_s0.75_city", "camvid", IMAGENET, (150,), "miou", (256, 512), CITY),
    Case("road_segmentation_adas_0001", "camvid", OPENVINO, (100,), "road", (512, 896)),
    Case("enet_davidtvs_default_camvid", "camvid", PLAIN, (150,), "miou"),
    Case("resnet56_jpeg_cifar10", "cifar10", IMAGENET),
    Case("efficientnet_lite0", "imagenet", LITE, (400,)),
)  # fmt: skip  # a table


# Data.


class Data:
    """Images of a data set: unlabelled ones for a run, and labelled ones that it never sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cached: tuple[str, Any] = ("", None)

    def decode(self, name: str) -> tuple[Array, Array, Array]:
        """Return unlabelled images [N, H, W, C], test images and their labels."""
        if self.cached[0] != name:
            self.cached = (name, digits() if name == "digits" else self._of_folder(name))
        return self.cached[1]

    def _of_folder(self, name: str) -> tuple[Array, Array, Array]:
        if not (self.folder / f"{name}.npz").is_file():
            raise FileNotFoundError(name)
        spec = importlib.util.spec_from_file_location("load", self.folder / "load.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        read = getattr(module, name)
        x, y = read("test")
        given = read("calibration" if name == "imagenet" else "train")[0]
        if name == "imagenet":
            given, x = (part[:, 1:225, 1:225] for part in (given, x))
        return given, x, y


def digits() -> tuple[Array, Array, Array]:
    parts = []
    for part in ("train", "test"):
        with np.load(ROOT / "cpd_onnx" / "models" / f"digits_{part}.npz") as arrays:
            parts.append(((arrays["image"].transpose(0, 2, 3, 1) * 255).round().astype(np.uint8), arrays["labels"]))
    return parts[0][0], *parts[1]


def resized(images: Array, size: tuple[int, int] | None, *, is_label: bool = False) -> Array:
    """Return images [N, H, W, …] of another size; digits get the frame of MNIST, 4 pixels on each side."""
    if size is None or images.shape[1:3] == size:
        return images
    frame = 4 if size == (28, 28) else 0
    how = Image.Resampling.NEAREST if is_label else Image.Resampling.BICUBIC
    inner = (size[1] - 2 * frame, size[0] - 2 * frame)
    flat = images[..., 0] if images.shape[-1] == 1 else images
    made = np.stack([np.asarray(Image.fromarray(image).resize(inner, how)) for image in flat])
    made = np.pad(made, [(0, 0), (frame, frame), (frame, frame)] + [(0, 0)] * (made.ndim - 3))
    return made[..., None] if images.shape[-1] == 1 and not is_label else made


def write_images(images: Array, folder: Path) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / f"{number:05d}.png")


# Scoring, independent of the program.


def opened(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # Where a processor has no instructions for sums of 8-bit products, its others saturate: compute what the file says.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answered(path: Path, case: Case, images: Array, output: str = "") -> Iterator[Array]:
    """Yield the class of each image, or of each of its pixels, batch by batch; of the first output if none is named."""
    session = opened(path)
    entry = session.get_inputs()[0]
    size = entry.shape[0] if isinstance(entry.shape[0], int) else (8 if images.shape[1] > 64 else 64)
    is_last = entry.shape[-1] == 3
    for start in range(0, len(images), size):
        feed = {entry.name: case.pixels(images[start : start + size], is_last=is_last)}
        scores = session.run([output or session.get_outputs()[0].name], feed)[0]
        yield scores.argmax(-1 if is_last else 1)


def independent(
    case: Case, files: tuple[Path, Path], others: Array, images: Array, labels: Array, output: str
) -> dict[str, Any]:
    """Return how often an output of two files agrees on other images of the same source, and the labelled scores.

    `elsewhere` is the agreement on the test images.
    """
    first, second = (np.concatenate([*answered(file, case, images)]) for file in files)
    if case.score == "top1":
        scores = [float((found == labels).mean()) for found in (first, second)]
    else:
        wanted = resized(labels, first.shape[1:], is_label=True)
        scores = [iou(case, found, wanted) for found in (first, second)]
    same, elsewhere = (same_answers(case, files, given, output) for given in (others, images))
    error = float(same.std(ddof=1) / np.sqrt(len(same)))
    return {
        "agreement": float(same.mean()), "error": error, "samples": len(same), "elsewhere": float(elsewhere.mean()),
        "scores": scores,
    }  # fmt: skip  # a table


def same_answers(case: Case, files: tuple[Path, Path], images: Array, output: str) -> Array:
    """Return the fraction of equal answers of each image: classes of the image, or of its pixels."""
    first, second = (np.concatenate([*answered(file, case, images, output)]) for file in files)
    return np.asarray((first == second).reshape(len(first), -1).mean(1))


def iou(case: Case, found: Array, labels: Array) -> float:
    """Return the mean intersection over union over the classes of CamVid, or that of the road."""
    counts = labels != 255
    if case.score == "road":
        is_road, was_road = (found > 0)[counts], (labels == ROAD)[counts]
        return float((is_road & was_road).sum() / (is_road | was_road).sum())
    found = found if case.classes is None else case.classes[found]
    values = []
    for name in range(11):
        is_class, was_class = (found == name)[counts], (labels == name)[counts]
        values.append((is_class & was_class).sum() / max(1, (is_class | was_class).sum()))
    return float(np.mean(values))


# Runs and their verdicts.


def row(case: Case, model: Path, count: int, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a run with so many images said, and what is true."""
    given, _, _ = data.decode(case.data)
    chosen = np.random.default_rng(SEED).permutation(len(given))[:count]
    found: dict[str, Any] = {"model": case.model, "images": len(chosen)}
    kept_at = options.keep / f"{case.model}_{count}" if options.keep else None
    if options.again:
        if not (kept_at / "small.onnx").exists():
            return found | {"answer": "not kept"}
        content = json.loads((kept_at / "result.json").read_text())
        found |= {"code": content["verdict"]["code"], "seconds": round(content["seconds"])}
        return found | judged(case, model, kept_at / "small.onnx", content, chosen, data)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_images(resized(given[np.sort(chosen)], case.size), work / "images")
        words = [options.command, str(model), "-o", str(work / "small.onnx"), "--data", str(work / "images")]
        words += [*case.pixels.options, *options.more, "--json", str(work / "result.json")]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "cpd_onnx", *words], capture_output=True, text=True, check=False)
        found |= {"code": done.returncode, "seconds": round(time.perf_counter() - started)}
        if not (work / "small.onnx").exists():
            return found | {"answer": "nothing written", "said": (done.stderr or done.stdout).strip().splitlines()[-1]}
        if kept_at is not None:
            kept_at.mkdir(parents=True, exist_ok=True)
            for name in ("small.onnx", "result.json"):
                shutil.copy(work / name, kept_at / name)
        content = json.loads((work / "result.json").read_text())
        return found | judged(case, model, work / "small.onnx", content, chosen, data)


def judged(case: Case, model: Path, small: Path, content: dict[str, Any], chosen: Array, data: Data) -> dict[str, Any]:
    """Return what the report of a run said about a model, and what is true of it."""
    given, images, labels = data.decode(case.data)
    stated = content["agreement"]
    others = np.setdiff1d(np.arange(len(given)), chosen)
    others = given[np.sort(np.random.default_rng(SEED).permutation(others)[:OTHERS])]
    parts = (resized(part, case.size) for part in (others, images))
    true = independent(case, (model, small), *parts, labels, stated["output"])
    answer = next(entry for entry in content["verdict"]["answers"] if entry["question"] == "as good")
    macs = content["after"]["macs"] / content["before"]["macs"]
    found = {"answer": answer["answer"], "said": answer["text"], "stated": stated, "macs": macs, "independent": true}
    return found | {"wrong": wrong(answer["answer"], stated, true)}


def wrong(answer: str, stated: dict[str, Any], true: dict[str, Any]) -> str:
    """Return why an answer is wrong; empty if it is right."""
    least, lost = 1 - BOUND, true["scores"][0] - true["scores"][1]
    if answer == "yes":
        if true["agreement"] < least:
            return "fewer answers are the original's"
        if true["agreement"] + SURE * true["error"] < stated["low"]:
            return "the stated bound does not hold"
        return "the labelled score lost more" if lost > BOUND else ""
    if answer == "no":
        return "as many answers are the original's" if true["agreement"] >= least and lost <= BOUND else ""
    return "" if not stated["is_held_out"] or stated["low"] < least <= stated["high"] else "the samples tell it"


def kept(
    path: Path, rows: list[dict[str, Any]], made: dict[str, Any], keys: tuple[str, ...], **more: Any
) -> list[dict[str, Any]]:
    """Return and store the rows with a new one, in place of that with the same keys."""
    rows = [row for row in rows if any(row[key] != made[key] for key in keys)] + [made]
    path.write_text(json.dumps({**more, "rows": rows}, indent=1) + "\n")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | images | code | MACs left | as good? | stated agreement | on other images | on the test images "
        "| labelled score | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for entry in rows:
        head = f"| {entry['model']} | {entry['images']} | {entry['code']} | "
        if "stated" not in entry:
            print(f"{head}| {entry['answer']}: {entry['said'][:90]} | | | | |")
            continue
        stated, true = entry["stated"], entry["independent"]
        said = f"{stated['value']:.3f}, at least {stated['low']:.3f} (n = {stated['samples']})"
        scores = " -> ".join(f"{100 * value:.1f}" for value in true["scores"])
        judged = f"WRONG: {entry['wrong']}" if entry["wrong"] else "right"
        elsewhere = f"{true['elsewhere']:.3f}" if "elsewhere" in true else "the same"
        print(
            f"{head}{entry['macs']:.2f} | {entry['answer']} | {said} | {true['agreement']:.3f} | {elsewhere} | {scores} "
            f"| {judged} |"
        )
    made = [entry for entry in rows if "stated" in entry]
    counts = {answer: sum(entry["answer"] == answer for entry in made) for answer in ("yes", "no", "unknown")}
    right = sum(not entry["wrong"] for entry in made)
    print(f"\n{right} of {len(made)} verdicts are right; {', '.join(f'{n} {answer}' for answer, n in counts.items())}")


def main() -> None:
    """Run, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="a model that lies elsewhere")
    parser.add_argument("--only", action="append", help="name of a model; may be repeated")
    parser.add_argument("--images", type=int, action="append", help="number of images instead of the usual ones")
    parser.add_argument("--command", choices=("prune", "compress"), default="prune")
    parser.add_argument("--more", action="append", default=[], help="further option of the command")
    parser.add_argument("--keep", type=Path, help="folder in which the results are kept")
    parser.add_argument(
        "--again", action="store_true", help="judge the results that are kept in --keep, and run nothing"
    )
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    elsewhere = dict(entry.split("=", 1) for entry in options.model) | {"digits": ROOT / "cpd_onnx/models/digits.onnx"}
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for case in () if options.table else CASES:
        if options.only and case.model not in options.only:
            continue
        data = Data(options.data_folder)
        model = Path(elsewhere.get(case.model, options.data_folder / "onnx" / f"{case.model}.onnx"))
        try:
            data.decode(case.data)
        except FileNotFoundError:
            model = Path()
        for count in (options.images or case.counts) if model.is_file() else ():
            made = row(case, model, count, data, options)
            command = f"python benchmarks/accuracy/verdicts.py --command {options.command} {' '.join(options.more)}"
            rows = kept(options.out, rows, made, ("model", "images"), command=command.strip())
            print(made["model"], count, made["code"], made["answer"], made["seconds"], "s", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
