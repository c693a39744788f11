"""Export scikit-learn models with skl2onnx.

Environment: pip install scikit-learn skl2onnx onnx onnxruntime==1.31.1

    python export_sklearn.py --out DIR [--only REGEX]
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import common
import numpy as np
import skl2onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

LAYERS = {"hidden_layer_sizes": (40, 24), "max_iter": 60, "random_state": 0}
PLAIN = {"zipmap": False}
# name, family, estimator, opset, options
MODELS = [
    ("mlp_classifier", "mlp", MLPClassifier(**LAYERS), 17, PLAIN),
    ("mlp_regressor", "mlp", MLPRegressor(**LAYERS, activation="tanh"), 13, {}),
    ("logistic_regression", "linear", LogisticRegression(), 17, {}),
    ("ridge", "linear", Ridge(), 15, {}),
    (
        "pca_mlp",
        "pipeline",
        make_pipeline(StandardScaler(), PCA(8, random_state=0), MLPClassifier(**LAYERS)),
        15,
        PLAIN,
    ),
    ("random_forest", "trees", RandomForestClassifier(10, max_depth=4, random_state=0), 17, PLAIN),
    ("gradient_boosting", "trees", GradientBoostingRegressor(n_estimators=10, random_state=0), 17, {}),
    ("svc", "kernel", SVC(probability=False, random_state=0), 17, PLAIN),
    ("kmeans", "cluster", KMeans(5, random_state=0, n_init=1), 17, {}),
]


def jobs() -> Iterator[common.Job]:
    """List the models."""
    for name, family, estimator, opset, options in MODELS:
        yield common.Job(
            name=f"{name}.skl2onnx.opset{opset}",
            family=family,
            build=partial(export, estimator, options, opset),
        )


def export(estimator: BaseEstimator, options: dict[str, object], opset: int, path: Path) -> None:
    """Fit on three noisy clusters in twelve dimensions and export."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 3
    samples = (rng.normal(size=(240, 12)) + labels[:, None] * rng.normal(size=12)).astype(np.float32)
    estimator.fit(samples, labels)
    model = skl2onnx.convert_sklearn(
        estimator,
        options=options,
        initial_types=[("x", FloatTensorType([None, 12]))],
        target_opset={"": opset, "ai.onnx.ml": 3},
    )
    path.write_bytes(model.SerializeToString())


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__)
    common.run(jobs(), args, exporter="skl2onnx", version=skl2onnx.__version__)


if __name__ == "__main__":
    main()
