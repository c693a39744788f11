"""A pass for workflows of Microsoft's Olive, which removes channels, repairs, distills and proves the model.

Olive finds the passes that its package configuration lists; `package_config` returns Olive's own with this one added.
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

from cpd_onnx.budget.targets import ALL_KINDS, KINDS, Targets, parse
from cpd_onnx.data.open import SYNTHETIC, Data
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.options import former_names, options_of
from cpd_onnx.passes.allocate import bounds
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.workflow.api import CompressOptions, compressed_by
from cpd_onnx.workflow.requests import Compress

_REPLACED = {"data", "input_shapes", "train", "latency_provider", "progress", *KINDS, "target"}
"""Arguments of `api.compress` for which this pass has options of its own, or which are no values."""
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "int | str": int | str}
"""Types of options that JSON has as well; values of other types are strings, as on the command line."""


def _options() -> dict[str, PassConfigParam]:
    """Return the parameters of the pass for the options of `api.compress`, with its defaults."""
    options = {named.name: named.option for named in options_of(Compress)}
    parameters = {
        field.name: PassConfigParam(
            type_=list[str]
            if options[field.name].is_many
            else _TYPES.get(str(field.type).removesuffix(" | None"), str),
            default_value=None,
            description=f"{options[field.name].help}.",
            category=ParamCategory.PATH if options[field.name].takes == "file" else ParamCategory.NONE,
        )
        for field in fields(CompressOptions)
        if field.name not in _REPLACED
    }
    shapes = PassConfigParam(
        type_=dict[str, list[int]], default_value=None, description="Shapes of inputs with symbolic sizes, by name."
    )
    train = PassConfigParam(
        type_=bool | dict[str, Any],
        default_value=None,
        description=f"{options['distill'].help}; a mapping sets options of the training.",
    )
    former = {old: parameters[new] for old, new in former_names(CompressOptions).items()}
    return {**parameters, **former, "input_shapes": shapes, "train": train}


def package_config() -> dict[str, Any]:
    """Return Olive's package configuration with this pass, for `olive.workflows.run` or, as a file, `olive run`."""
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
    """Prune an ONNX model; with a `data_config`, repair and distill it as well.

    The plan, which records the removed channels, is written beside the model and is one of its `additional_files`.
    """

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        """Return False: a latency target is measured on the accelerator."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        provider = accelerator_spec.execution_provider
        return {
            "target": PassConfigParam(
                type_=str,
                default_value="macs=0.5",
                search_defaults=Categorical(["macs=0.7", "macs=0.5", "macs=0.35"]),
                description=f"KIND=AMOUNT,…: the fraction or amount of {', '.join(ALL_KINDS)} that may remain.",
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict,
                default_value=None,
                description="A few hundred unlabelled samples, which are held in memory.",
            ),
            "synthetic_data": PassConfigParam(
                type_=bool, default_value=False, description="Use synthetic samples if there is no data_config."
            ),
            "latency_provider": PassConfigParam(
                type_=str,
                default_value=str(provider) if provider else Setting.provider,
                description="Execution provider with which latency is measured.",
            ),
            **_options(),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Write the pruned model to the path that Olive gives."""
        if not isinstance(model, ONNXModelHandler):
            raise UnsupportedError(f"the model must be an ONNX model, got {type(model).__name__}: convert it first")
        values = {name: getattr(config, name) for name in ("latency_provider", *_options())}
        given = {name: value for name, value in values.items() if value is not None}
        given["widths"] = tuple(map(bounds, given.get("widths", ())))
        options = CompressOptions(_data(model, config), **given | {"target": _target(config.target)})
        outcome = compressed_by(model.model_path, options)
        plan = outcome.state.need("plan", "prune")
        path = Path(resolve_onnx_path(output_model_path, _name(Path(model.model_path), plan)))
        outcome.state.save(path, overwrite=True)  # a folder of Olive's cache that holds nothing else
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
    """Return a unique file name: Olive would load a file of the same name in its working folder instead."""
    return f"{source.stem}-{hashlib.sha256(plan.dumps().encode()).hexdigest()[:8]}.onnx"


def _target(text: str) -> Targets:
    try:
        return parse(text)
    except ValueError as error:
        raise TargetError(f"target {text!r} is not KIND=AMOUNT with one of {', '.join(ALL_KINDS)}") from error


def _data(model: ONNXModelHandler, config: BasePassConfig) -> Data | None:
    """Return the samples of the data config, as arrays if possible, so that training can form batches of its own."""
    if config.data_config is None:
        return SYNTHETIC if config.synthetic_data else None
    container = validate_config(config.data_config, DataConfig).to_data_container()
    feeds = list(container.create_calibration_dataloader(model.model_path, model.io_config))
    if not feeds:
        raise DataError("the data_config contains no samples")
    if any(feed[name].shape[1:] != first.shape[1:] for feed in feeds for name, first in feeds[0].items()):
        return feeds
    return ArraySource({name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
