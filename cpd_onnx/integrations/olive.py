"""A pass for workflows of Microsoft's Olive: channels go, and what is left is repaired, distilled and proven.

Olive knows the passes that its package configuration lists: `package_config` gives Olive's own with this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from olive.common.config_utils import ParamCategory, validate_config
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.resource_path import LocalFolder
from olive.search.search_parameter import Categorical

from cpd_onnx.budget.allocation import KINDS
from cpd_onnx.data.open import SYNTHETIC, Data
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.workflow.api import compressed

_OPTIONS: dict[str, tuple[Any, str]] = {
    "score": (str, "What ranks channels (default: reconstruction with data, else l2)."),
    "samples": (int, "Samples that the score looks at."),
    "spread": (str, "uniform, global, isomorphic or optimal."),
    "multiple": (int, "Widths that remain are multiples of this."),
    "min_share": (float, "Share of each group of channels that stays at least."),
    "max_share": (float, "Share of each group of channels that stays at most."),
    "keep": (list[str], "Patterns of groups, weights or nodes that are not touched."),
    "rounds": (int, "Rounds of pruning, repairing and distilling."),
    "repair": (bool, "Whether weights are fitted to the original by least squares (default: with data)."),
    "repair_samples": (int, "Samples that a repair looks at."),
    "seed": (int, "Of everything random."),
    "latency_threads": (int, "Threads of an operator for which latency is measured; 0: onnxruntime's choice."),
    "latency_batch": (int, "Samples at a time for which latency is measured."),
    "cost_table": (str, "File of latencies that were measured elsewhere."),
    "input_shapes": (dict[str, list[int]], "Sizes of inputs that the model leaves open, by name."),
    "allow_inconclusive": (
        bool,
        "Whether a model passes of which the inputs show too little to prove it right or wrong.",
    ),
    "train": (bool | dict[str, Any], "Whether the result is distilled (default: with data), or options of that."),
}
"""Of `api.compress`, each with its type and what it is for; what is not given is what it is there."""


def package_config() -> dict[str, Any]:
    """What `olive.workflows.run` takes as `package_config`, and `olive run` as a file: Olive's passes and this one."""
    from olive.package_config import OlivePackageConfig

    content: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    content["passes"]["CpdCompress"] = {
        "module_path": f"{__name__}.CpdCompress",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "dataset": "dataset_optional",
    }
    return content


class CpdCompress(Pass):
    """Prune an ONNX model; with a `data_config` it is repaired and distilled as well.

    The plan, which says what went, lies beside the model and is one of its `additional_files`.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        """No: where latency is the target, that of the accelerator is measured."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        provider = accelerator_spec.execution_provider
        return {
            "target": PassConfigParam(
                type_=str,
                default_value="macs=0.5",
                search_defaults=Categorical(["macs=0.7", "macs=0.5", "macs=0.35"]),
                description=f"KIND=FRACTION, what may remain of {', '.join(KINDS)}.",
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict,
                default_value=None,
                description="Some hundred samples, without labels, which are held in memory.",
            ),
            "synthetic_data": PassConfigParam(
                type_=bool, default_value=False, description="Make samples up where there is no data_config."
            ),
            "latency_provider": PassConfigParam(
                type_=str,
                default_value=str(provider) if provider else Setting.provider,
                description="Execution provider that latency is measured with.",
            ),
            **{
                name: PassConfigParam(
                    type_=type_,
                    default_value=None,
                    description=description,
                    category=ParamCategory.PATH if name == "cost_table" else ParamCategory.NONE,
                )
                for name, (type_, description) in _OPTIONS.items()
            },
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Write the smaller model where Olive wants it."""
        if not isinstance(model, ONNXModelHandler):
            raise UnsupportedError(f"CpdCompress takes ONNX models, not a {type(model).__name__}: convert it before")
        said = {name: getattr(config, name) for name in ("latency_provider", *_OPTIONS)}
        options = {name: value for name, value in said.items() if value is not None} | _target(config.target)
        made = compressed(model.model_path, _data(model, config), **options)
        plan = made.state.need("plan", "prune")
        path = Path(resolve_onnx_path(output_model_path, _name(Path(model.model_path), plan)))
        made.state.save(path, overwrite=True)  # in a folder of Olive's cache, where nothing else lies
        beside = path.with_name(f"{path.name}.plan.json")
        plan.save(beside, overwrite=True)
        attributes = dict(model.model_attributes or {})
        files = [*(attributes.get("additional_files") or []), str(beside)]
        return ONNXModelHandler(
            LocalFolder({"path": path.parent}),
            onnx_file_name=path.name,
            model_attributes=attributes | {"additional_files": sorted(files)},
        )


def _name(source: Path, plan: Plan) -> str:
    """A name that no file where Olive runs has: it would take that one, the original perhaps, for what we give it."""
    return f"{source.stem}-{hashlib.sha256(plan.dumps().encode()).hexdigest()[:8]}.onnx"


def _target(text: str) -> dict[str, Any]:
    kind, _, fraction = text.partition("=")
    if kind in KINDS:
        with contextlib.suppress(ValueError):
            return {kind: float(fraction)}
    raise TargetError(f"target {text!r} is not KIND=FRACTION with one of {', '.join(KINDS)}")


def _data(model: ONNXModelHandler, config: BasePassConfig) -> Data | None:
    """The samples of the data config, so that they can be put together anew for training."""
    if config.data_config is None:
        return SYNTHETIC if config.synthetic_data else None
    container = validate_config(config.data_config, DataConfig).to_data_container()
    feeds = list(container.create_calibration_dataloader(model.model_path, model.io_config))
    if not feeds:
        raise DataError("the data config gives no samples")
    if any(feed[name].shape[1:] != first.shape[1:] for feed in feeds for name, first in feeds[0].items()):
        return feeds
    return ArraySource({name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
