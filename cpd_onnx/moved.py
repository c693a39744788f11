"""Compatibility: names that have moved since the last version still work, with a DeprecationWarning.

A name that moves gets a row in `MODULES` or `NAMES`; the file is deleted in version `GONE_IN`. Nothing is imported
before an old name is used.
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
    from importlib.abc import Loader  # slow to import, as it loads tempfile and more

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
_ALLOCATION = "Curves=LossCurves SPREADS=POLICIES curves_of=loss_curves"
_TIMING = "allocate_on_the_clock=allocate_measured"
_SCORES = (
    "SCORERS=SCORE_FUNCTIONS Question=ScoreContext Scorer=ScoreFunction scorer=score_function "
    "scorer_of=find_score_function"
)
_NAMES = (
    ("cpd_onnx.algebra.keep", "cpd_onnx.algebra.keep", "Kept=KeepMask"),
    ("cpd_onnx.budget.allocation", "cpd_onnx.budget.allocation", _ALLOCATION),
    ("cpd_onnx.budget.allocation", "cpd_onnx.budget.timing", _TIMING),
    ("cpd_onnx.budget.latency", "cpd_onnx.budget.latency", "Clock=LatencyProbe"),
    ("cpd_onnx.data", "cpd_onnx.data.sources", "LABELS ArraySource FunctionSource ImageFolder ImageOptions Source"),
    ("cpd_onnx.data", "cpd_onnx.data.sources", "inputs_of open_source read_npz"),
    ("cpd_onnx.ir", "cpd_onnx.integrations.onnx_ir", "CompressPass"),
    ("cpd_onnx.passes.allocate", "cpd_onnx.budget.allocation", f"Allocation Budget allocate {_ALLOCATION}"),
    ("cpd_onnx.passes.allocate", "cpd_onnx.budget.timing", _TIMING),
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
"""Names that have moved or were renamed: (old module, old name) -> (new module, new name)."""
_LEFT = {old for old, _ in NAMES}
"""Modules out of which names have moved."""


def _warn(old: str, new: str) -> None:
    text = f"{old} has moved to {new}; the old name no longer works in version {GONE_IN}"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def _moved_name(module: str, name: str) -> Any:
    """Return a name that has moved out of a module, as the module's `__getattr__` (PEP 562)."""
    new = NAMES.get((module, name))
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", ".".join(new))
    return getattr(import_module(new[0]), new[1])


class _MovedModule:
    """Loader that provides a moved module under its old name."""

    def create_module(self, _: ModuleSpec) -> None:
        """Return None, so that Python creates the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Replace the module by the one of the new name."""
        old = module.__name__
        _warn(old, MODULES[old])
        sys.modules[old] = import_module(MODULES[old])


class _LeftModule(SourceFileLoader):
    """Loader of a module out of which names have moved."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, with a `__getattr__` that finds its moved names."""
        module.__dict__["__getattr__"] = partial(_moved_name, module.__name__)
        super().exec_module(module)


class _Finder:
    """Meta path finder of the modules in the tables."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module in the tables, else None."""
        if name in MODULES:
            return ModuleSpec(name, cast("Loader", _MovedModule()))
        if name not in _LEFT:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LeftModule(spec.loader.name, spec.loader.path)
        return spec


def keep_old_names() -> None:
    """Make imports find the old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
