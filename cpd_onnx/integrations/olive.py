"""A pass for workflows of Microsoft's Olive: channels go, and what is left is repaired, distilled and proven.

Olive knows the passes that its package configuration lists: `package_config` gives Olive's own with this one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
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
from cpd_onnx.options import options_of
from cpd_onnx.passes.allocate import bounds, target, target_options
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.workflow.api import CompressOptions, compressed_by
from cpd_onnx.workflow.requests import Compress

_NOT_OURS = {"data", "input_shapes", "train", "latency_provider", *KINDS}
"""Arguments of `api.compress` that are said otherwise here."""
_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool}
"""Types of options that a configuration, which is JSON, has too; others are texts, as on the command line."""


def _options() -> dict[str, PassConfigParam]:
    """The options of `api.compress`: what is not given is what it is there."""
    words = {named.name: named.option for named in options_of(Compress)}
    made = {
        field.name: PassConfigParam(
            type_=list[str] if words[field.name].is_many else _TYPES.get(str(field.type).partition(" |")[0], str),
            default_value=None,
            description=f"{words[field.name].help}.",
            category=ParamCategory.PATH if words[field.name].takes == "file" else ParamCategory.NONE,
        )
        for field in fields(CompressOptions)
        if field.name not in _NOT_OURS
    }
    shapes = PassConfigParam(
        type_=dict[str, list[int]], default_value=None, description=f"{words['input_shapes'].help}, by name."
    )
    train = PassConfigParam(
        type_=bool | dict[str, Any], default_value=None, description=f"{words['distill'].help}, or options of that."
    )
    return {**made, "input_shapes": shapes, "train": train}


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
            **_options(),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Write the smaller model where Olive wants it."""
        if not isinstance(model, ONNXModelHandler):
            raise UnsupportedError(f"CpdCompress takes ONNX models, not a {type(model).__name__}: convert it before")
        said = {name: getattr(config, name) for name in ("latency_provider", *_options())}
        given = {name: value for name, value in said.items() if value is not None}
        given["widths"] = tuple(map(bounds, given.get("widths", ())))
        options = CompressOptions(_data(model, config), **given | target_options(*_target(config.target)))
        made = compressed_by(model.model_path, options)
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


def _target(text: str) -> tuple[str, float]:
    try:
        return target(text)
    except ValueError as error:
        raise TargetError(f"target {text!r} is not KIND=FRACTION with one of {', '.join(KINDS)}") from error


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
