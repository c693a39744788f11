"""Does `--max-loss` keep what it promises? The loss is measured on data that the run never saw, by code of this file.

    python benchmarks/accuracy/max_loss.py --data-folder DATA [--magika MODEL] [--files FOLDER] [--crepe MODEL]
        [--only NAME]
    python benchmarks/accuracy/max_loss.py --table

DATA is a folder with `onnx/` and `load.py`. MODEL is the model.onnx that the package magika ships, which tells the type
of a file from its first and last bytes; FOLDER has files of many types. CREPE is a model that tells the pitch of 1,024
samples of sound at 16 kHz; the speech is that of the program espeak-ng, in several voices, which reads the documents of this
project. What is missing is skipped. The boxes of the detector are decoded by `cpd_onnx.data.detection`. Each run aims at a
tenth of the MACs and gives way to the bound, without training and without timing. A loss is within what was asked if it is
so within its sampling error (one-sided, 95 %).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from verdicts import ESPNET, IMAGENET, OPENVINO, ROOT, SEED, SURE, Data, Pixels, kept, opened

from cpd_onnx.data.detection import Detections, detections, detector_of

RESULT = ROOT / "benchmarks" / "results" / "max_loss.json"
BYTES, BLOCK, PADDING = 1024, 4096, 256
"""Bytes at each end of a file that magika takes, bytes from which they are stripped, and the token for none."""
MOST_FILES = 5000
RATE, FRAME, SPOKEN = 16000, 1024, 400
"""Samples in a second, samples in a frame, and words that each voice speaks at each speed."""
VOICES = (
    "en-us",
    "en-gb",
    "en-us+f1",
    "en-us+f2",
    "en-us+f3",
    "en-gb+f4",
    "en-us+m1",
    "en-us+m3",
    "en-gb+m5",
    "en-us+m7",
)
SPEEDS = (130, 175)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A model, its data and the bounds.

    Attributes:
        model: Stem of the file in DATA/onnx, "magika" or "crepe".
        data: Name of the data set, "files" or "speech".
        pixels: Preprocessing of images.
        given: Number of unlabelled samples that the run gets.
        labelled: Number of labelled samples for `--eval`; 0 for the agreement with the original.
        tested: Largest number of samples on which the loss is measured.
        bounds: Losses that are asked for.
        size: Height and width that images are resized to; None for those of the data set.
        is_pooled: Whether the parts are drawn from all images of the set, which has few; else from its own parts.
        is_unseen: Whether the run gets test images, others than those of the test; else images that the model was
            trained on, of which it is surer than of others.
    """

    model: str
    data: str
    pixels: Pixels | None = IMAGENET
    given: int = 3000
    labelled: int = 0
    tested: int = 5000
    bounds: tuple[float, ...] = (0.03, 0.01)
    size: tuple[int, int] | None = None
    is_pooled: bool = False
    is_unseen: bool = False


CASES = {
    "classifier": Case("resnet20_gtsrb", "gtsrb", is_unseen=True),
    "classifier, images of its training": Case("resnet20_gtsrb", "gtsrb"),
    "classifier, labels": Case("resnet20_gtsrb", "gtsrb", labelled=1500),
    "bytes of files": Case("magika", "files", None, bounds=(0.2, 0.1)),
    "transformer": Case("vit_cifar10_smmk47", "cifar10", bounds=(0.2, 0.1)),
    "segmentation": Case(
        "espnet_p2_q8_camvid", "camvid", ESPNET, given=400, tested=200, bounds=(0.1, 0.05), is_pooled=True
    ),
    "detector": Case(
        "yolox_nano", "imagenet", OPENVINO, given=1000, tested=500, bounds=(0.2, 0.1), size=(416, 416), is_pooled=True
    ),
    "pitch of speech": Case("crepe", "speech", None, given=2000, bounds=(0.2, 0.1)),
}


@dataclass(frozen=True)
class Parts:
    """Inputs for the run, and inputs with labels for its `--eval` and for the test; labels are None where unknown."""

    given: Array
    judged: tuple[Array, Array] | None
    tested: tuple[Array, Array | None]


def parts_of(case: Case, options: argparse.Namespace) -> Parts | None:
    """Return the data of a case; None if it is missing."""
    rng = np.random.default_rng(SEED)
    if case.data == "files":
        if options.files is None or options.magika is None:
            return None
        inputs = of_files(options.files, rng)
        return Parts(inputs[: case.given], None, (inputs[case.given :], None))
    if case.data == "speech":
        if options.crepe is None or shutil.which("espeak-ng") is None:
            return None
        inputs = frames(rng)
        return Parts(inputs[: case.given], None, (inputs[case.given :][: case.tested], None))
    assert case.pixels is not None
    try:
        given, images, labels = Data(options.data_folder).decode(case.data)
    except FileNotFoundError:
        return None
    if case.is_pooled:
        pool = np.concatenate([given, images])
        images, labels = pool[rng.permutation(len(pool))], None
        given, images = images[: case.given], images[case.given :]
    rows, test = rng.permutation(len(given))[: case.given], rng.permutation(len(images))
    if case.is_unseen:
        given, rows = images, test[case.labelled + case.tested :][: case.given]
    judged, tested = test[: case.labelled], test[case.labelled :][: case.tested]

    def entered(chosen: Array) -> Array:
        assert case.pixels is not None
        return case.pixels(chosen if case.size is None else resized(chosen, case.size))

    with_labels = (entered(images[judged]), labels[judged]) if case.labelled else None
    return Parts(
        entered(given[rows]), with_labels, (entered(images[tested]), None if labels is None else labels[tested])
    )


def of_files(folder: Path, rng: np.random.Generator) -> Array:
    """Return the tokens of files, at most 200 of a suffix, in random order."""
    by: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size >= 64:
            by.setdefault(path.suffix, []).append(path)
    paths = [paths[place] for paths in by.values() for place in rng.permutation(len(paths))[:200]]
    return np.stack([tokens(paths[place]) for place in rng.permutation(len(paths))[:MOST_FILES]])


def tokens(path: Path) -> Array:
    """Return the first and last bytes of a file without blanks at its ends, as magika takes them."""
    with path.open("rb") as file:
        first = file.read(BLOCK).lstrip()[:BYTES]
        file.seek(max(0, path.stat().st_size - BLOCK))
        last = file.read(BLOCK).rstrip()[-BYTES:]
    found = np.full(2 * BYTES, PADDING, np.int32)
    found[: len(first)] = np.frombuffer(first, np.uint8)
    found[2 * BYTES - len(last) :] = np.frombuffer(last, np.uint8)
    return found


def resized(images: Array, size: tuple[int, int]) -> Array:
    """Return images [N, H, W, C] in another height and width."""
    return np.stack([np.asarray(Image.fromarray(image).resize(size[::-1])) for image in images])


def frames(rng: np.random.Generator) -> Array:
    """Return frames of speech [N, 1024] at 16 kHz, without pauses, of mean 0 and deviation 1, in random order."""
    words = re.findall("[A-Za-z]{2,}", " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    found = []
    for number, voice in enumerate(VOICES):
        for speed in SPEEDS:
            start = rng.integers(0, len(words) - SPOKEN)
            said = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(20 + 10 * (number % 7)), "--stdout"]
            done = subprocess.run([*said, " ".join(words[start : start + SPOKEN])], capture_output=True, check=True)
            with wave.open(io.BytesIO(_sized(done.stdout))) as stream:
                rate, raw = stream.getframerate(), stream.readframes(stream.getnframes())
            sound = np.frombuffer(raw, "<i2").astype(np.float32)
            places = np.arange(0, len(sound) - 1, rate / RATE)
            sound = np.interp(places, np.arange(len(sound)), sound).astype(np.float32)
            cut = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)
            found.append(cut[cut.std(axis=1) > 0.3 * sound.std()])
    made = np.concatenate(found)
    made = (made - made.mean(axis=1, keepdims=True)) / made.std(axis=1, keepdims=True)
    return np.asarray(made[rng.permutation(len(made))], np.float32)


def _sized(stream: bytes) -> bytes:
    """Return a WAV file with the length in its header, which a program that writes to a pipe does not know."""
    return stream[:40] + (len(stream) - 44).to_bytes(4, "little") + stream[44:]


def boxes(path: Path, inputs: Array) -> list[Detections]:
    """Return the detections in each image with a score of at least 0.3."""
    session = opened(path)
    name, names = session.get_inputs()[0].name, [entry.name for entry in session.get_outputs()]
    size = (inputs.shape[2], inputs.shape[3])
    kind = detector_of([session.run(None, {name: inputs[:1]})[0]], size)
    return [
        detections(session.run(None, {name: inputs[at : at + 1]}), size, names=names, detector=kind, least_score=0.3)[0]
        for at in range(len(inputs))
    ]


def missed(first: Detections, second: Detections) -> float:
    """Return 1 - F1 of the boxes of an image against the original's: same class, and an overlap of at least a half."""
    if not len(first.boxes) or not len(second.boxes):
        return float(len(first.boxes) != len(second.boxes))
    left, found = list(range(len(second.boxes))), 0
    for box, kind in zip(first.boxes, first.classes, strict=True):
        overlaps = [_overlap(box, second.boxes[at]) if second.classes[at] == kind else 0.0 for at in left]
        if overlaps and max(overlaps) >= 0.5:
            left.pop(int(np.argmax(overlaps)))
            found += 1
    return 1 - 2 * found / (len(first.boxes) + len(second.boxes))


def _overlap(first: Array, second: Array) -> float:
    """Return the intersection over union of two boxes."""
    sides = np.maximum(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0)
    areas = [np.prod(box[2:] - box[:2]) for box in (first, second)]
    return float(np.prod(sides) / (sum(areas) - np.prod(sides)))


def answers(path: Path, inputs: Array) -> Array:
    """Return the classes of the samples, or of their pixels."""
    session = opened(path)
    name, size = session.get_inputs()[0].name, 4 if inputs.ndim == 4 and inputs.shape[-1] > 64 else 64
    made = [session.run(None, {name: inputs[at : at + size]})[0].argmax(1) for at in range(0, len(inputs), size)]
    return np.concatenate(made)


def lost(first: Array, second: Array, labels: Array | None) -> tuple[float, float]:
    """Return the loss of the second answers, of the score on labels or of the agreement, and its standard error."""
    if labels is None:
        each = (first != second).reshape(len(first), -1).mean(1)
    else:
        each = (first == labels).astype(float) - (second == labels)
    return mean_of(each)


def mean_of(each: Array) -> tuple[float, float]:
    """Return a mean and its standard error."""
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def row(name: str, case: Case, model: Path, bound: float, parts: Parts) -> dict[str, Any]:
    """Return what a run with a bound left and lost."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        entry = opened(model).get_inputs()[0].name
        np.savez(work / "data.npz", **{entry: parts.given})
        words = ["prune", str(model), "-o", str(work / "small.onnx"), "--data", str(work / "data.npz")]
        if parts.judged is not None:
            np.savez(work / "eval.npz", **{entry: parts.judged[0], "labels": parts.judged[1]})
            words = ["compress", *words[1:], "--eval", str(work / "eval.npz"), "--no-distill", "--no-report"]
        words += ["--max-loss", str(bound), "--target", "macs=0.1", "--no-check-speed"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cpd_onnx", *words, "--json", str(work / "result.json")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip  # what and how
        made = {
            "case": name, "model": case.model, "asked": bound, "code": done.returncode,
            "seconds": round(time.perf_counter() - started),
        }  # fmt: skip  # a table
        if not (work / "small.onnx").exists():
            return made | {"said": (done.stderr or done.stdout).strip().splitlines()[-1][-200:]}
        content = json.loads((work / "result.json").read_text())
        inputs, labels = parts.tested
        pair = (model, work / "small.onnx")
        if case.model == "yolox_nano":
            each = np.array([missed(*both) for both in zip(*(boxes(path, inputs) for path in pair), strict=True)])
            loss, error = mean_of(each)
        else:
            loss, error = lost(*(answers(path, inputs) for path in pair), _used(case, labels))
    told = next(entry for entry in content["verdict"]["answers"] if entry["question"] == "as good")
    return made | {
        "macs": content["after"]["macs"] / content["before"]["macs"], "answer": told["answer"], "said": told["text"],
        "loss": loss, "error": error, "samples": len(inputs), "is_within": loss - SURE * error <= bound,
    }  # fmt: skip  # a table


def _used(case: Case, labels: Array | None) -> Array | None:
    return labels if case.labelled else None


def show(rows: list[dict[str, Any]]) -> None:
    print("| case | asked | code | MACs left | as good? | loss on other data | within |")
    print("|---|---|---|---|---|---|---|")
    for entry in rows:
        head = f"| {entry['case']} ({entry['model']}) | {entry['asked']:g} | {entry['code']} | "
        if "loss" not in entry:
            print(f"{head}| {entry['said']} | | |")
            continue
        loss = f"{entry['loss']:.4f} ± {SURE * entry['error']:.4f} (n = {entry['samples']})"
        within = "yes" if entry["is_within"] else "NO"
        print(f"{head}{entry['macs']:.2f} | {entry['answer']} | {loss} | {within} |")
    made = [entry for entry in rows if "loss" in entry]
    print(f"\n{sum(entry['is_within'] for entry in made)} of {len(made)} losses are within what was asked")


def main() -> None:
    """Run, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--magika", type=Path, help="model.onnx of the package magika")
    parser.add_argument("--crepe", type=Path, help="model of the pitch, [N, 1024] to [N, 360]")
    parser.add_argument("--files", type=Path, help="folder with files of many types")
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for name in () if options.table else options.only or CASES:
        case = CASES[name]
        shipped = {"magika": options.magika, "crepe": options.crepe}
        model = shipped[case.model] if case.model in shipped else options.data_folder / "onnx" / f"{case.model}.onnx"
        parts = parts_of(case, options) if model is not None and model.is_file() else None
        for bound in case.bounds if parts is not None else ():
            assert parts is not None
            made = row(name, case, model, bound, parts)
            rows = kept(options.out, rows, made, ("case", "asked"))
            print(name, bound, made["code"], made.get("loss"), made["seconds"], "s", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
