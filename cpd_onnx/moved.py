"""Names that have moved since the last version keep working under their old ones, with a DeprecationWarning.

`MODULES` and `NAMES` are the whole of it: a name that moves gets a row there, and this file goes with `GONE_IN`.
Nothing is imported before an old name is used.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader  # which loads tempfile and more

GONE_IN = "0.2"
"""The version in which the old names no longer work."""
MODULES = {
    "cpd_onnx.bench": "cpd_onnx.runtime.bench",
    "cpd_onnx.cost": "cpd_onnx.channels.costs",
    "cpd_onnx.graph": "cpd_onnx.ir.model",
    "cpd_onnx.kept": "cpd_onnx.algebra.keep",
    "cpd_onnx.metrics": "cpd_onnx.data.metrics",
    "cpd_onnx.olive": "cpd_onnx.integrations.olive",
    "cpd_onnx.plan": "cpd_onnx.rewrite.plan",
    "cpd_onnx.tensors": "cpd_onnx.ir.tensors",
    "cpd_onnx.weights": "cpd_onnx.channels.weights",
}
"""Modules: the old name -> the new one."""
_ALLOCATION = "Curves=LossCurves allocate_on_the_clock=allocate_measured curves_of=loss_curves"
_SCORES = (
    "SCORERS=SCORE_FUNCTIONS Question=ScoreContext Scorer=ScoreFunction scorer=score_function "
    "scorer_of=find_score_function"
)
_NAMES = (
    ("cpd_onnx.algebra.keep", "cpd_onnx.algebra.keep", "Kept=KeepMask"),
    ("cpd_onnx.budget.allocation", "cpd_onnx.budget.allocation", _ALLOCATION),
    ("cpd_onnx.budget.latency", "cpd_onnx.budget.latency", "Clock=LatencyProbe"),
    ("cpd_onnx.data", "cpd_onnx.data.sources", "LABELS ArraySource FunctionSource ImageFolder ImageOptions Source"),
    ("cpd_onnx.data", "cpd_onnx.data.sources", "inputs_of open_source read_npz"),
    ("cpd_onnx.ir", "cpd_onnx.integrations.onnx_ir", "CompressPass"),
    ("cpd_onnx.passes.allocate", "cpd_onnx.budget.allocation", f"Allocation Budget allocate {_ALLOCATION}"),
    ("cpd_onnx.passes.comb", "cpd_onnx.channels.combing", "comb"),
    ("cpd_onnx.passes.score", "cpd_onnx.scores.registry", f"score {_SCORES}"),
    ("cpd_onnx.passes.sensitivity", "cpd_onnx.passes.sensitivity", "curves_of=measured_curves"),
    ("cpd_onnx.passes.verify", "cpd_onnx.proof.files", "FileVerification data_feeds verify_files"),
    ("cpd_onnx.pipeline", "cpd_onnx.pipeline.pipeline", "PASSES Pass make parse run"),
    ("cpd_onnx.report", "cpd_onnx.report.tables", "comparison inspection proof_line result table_of"),
    ("cpd_onnx.report", "cpd_onnx.summary", "count share"),
    ("cpd_onnx.runtime", "cpd_onnx.data.synthetic", "Synthetic"),
    ("cpd_onnx.runtime", "cpd_onnx.runtime.sessions", "execute latency_ratio open_model random_feed"),
    ("cpd_onnx.scores", "cpd_onnx.scores.registry", _SCORES),
    ("cpd_onnx.scores.registry", "cpd_onnx.scores.registry", _SCORES),
    ("cpd_onnx.shapes", "cpd_onnx.shapes.inference", "Folded fold"),
)
NAMES = {
    (old, name): (new, renamed or name)
    for old, new, names in _NAMES
    for name, _, renamed in (entry.partition("=") for entry in names.split())
}
"""Names that left a module or were renamed: (module, old name) -> (module, name) where it is now."""
_LEFT = {old for old, _ in NAMES}


def _warn(old: str, new: str) -> None:
    text = f"{old} has moved to {new}; the old name no longer works in version {GONE_IN}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def _moved_name(module: str, name: str) -> Any:
    """What a module is asked for that it does not have (PEP 562)."""
    new = NAMES.get((module, name))
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", ".".join(new))
    return getattr(import_module(new[0]), new[1])


class _MovedModule:
    """Gives the module of the new name under the old one."""

    def create_module(self, _: ModuleSpec) -> None:
        """Leave that to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of this one."""
        old = module.__name__
        _warn(old, MODULES[old])
        sys.modules[old] = import_module(MODULES[old])


class _LeftModule(SourceFileLoader):
    """Loads a module that some names have left."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and let it find what has left it."""
        module.__dict__["__getattr__"] = partial(_moved_name, module.__name__)
        super().exec_module(module)


class _Finder:
    """Finds modules with a row in one of the tables, and no others."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """How to load a module; None where this is not known here."""
        if name in MODULES:
            return ModuleSpec(name, cast("Loader", _MovedModule()))
        if name not in _LEFT:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LeftModule(spec.loader.name, spec.loader.path)
        return spec


def keep_old_names() -> None:
    """Let imports find old names from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
