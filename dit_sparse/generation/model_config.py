"""The config of a pipeline, ``model_index.json``: read and checked before weights are downloaded or loaded."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from dit_sparse.pipelines.family import FAMILIES

from ..bundled import model_source
from ..notation.reading import read_json

HUB_FAILURES = {  # names of exceptions of huggingface_hub, the specific ones first
    "GatedRepoError": "access to it is restricted: accept its terms on the hub, and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has no such model, or it is private: check the name, or log in",
    "RevisionNotFoundError": "the hub has no such revision of it",
    "RemoteEntryNotFoundError": "it has no model_index.json, so it is not a diffusers pipeline",
    "OfflineModeIsEnabled": "offline mode is enabled (HF_HUB_OFFLINE), and the local cache does not have it",
    "LocalEntryNotFoundError": "the hub cannot be reached, and the local cache does not have it",
    "HFValidationError": "it is neither a folder nor a valid name on the hub",
    "ConnectionError": "the hub cannot be reached",
    "ConnectError": "the hub cannot be reached",
    "Timeout": "the hub does not answer",
    "TimeoutException": "the hub does not answer",
}


def pipeline_config(model: str) -> dict:
    """Return ``model_index.json`` of a local folder or of a model on the hub. Nothing else is downloaded.

    Raises:
        ValueError: the file cannot be read or downloaded.
    """
    source = model_source(model)
    if _is_path(source):
        if not os.path.isfile(Path(source) / "model_index.json"):
            reason = "it is not a diffusers pipeline, because it has no model_index.json"
            raise ValueError(f"cannot load the model {source[:200]}: {reason}")
        try:
            config = read_json(Path(source) / "model_index.json")
        except ValueError as error:
            raise ValueError(f"cannot load the model {model}: {error}") from None
    else:
        from diffusers import DiffusionPipeline

        try:
            config = DiffusionPipeline.load_config(source)
        except Exception as error:
            raise ValueError(f"cannot load the model {model[:200]}: {failure_reason(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"cannot load the model {model}: its model_index.json names no pipeline class")
    return config


def check_family(model: str, config: dict) -> None:
    """Raise ValueError if no adapter supports a transformer of a pipeline. Classes outside of diffusers are accepted,
    because they may be subclasses of supported ones."""
    components = [(name, part) for name, part in config.items() if isinstance(part, list) and len(part) == 2]
    transformers = [part for name, part in components if name.startswith("transformer") and part[1] is not None]
    if not transformers:
        raise ValueError(f"{model} is a {config['_class_name']}, which has no video transformer")
    if all(library == "diffusers" and not _has_adapter(str(name)) for library, name in transformers):
        raise ValueError(f"{model} has a {transformers[0][1]}, which no adapter in dit_sparse/pipelines supports")


def failure_reason(error: BaseException) -> str:
    """Return the first line of an error; of a failed download, why it failed."""
    chain, current = [], error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    classes = {cls.__name__ for each in chain for cls in type(each).__mro__}
    reason = next((text for name, text in HUB_FAILURES.items() if name in classes), None)
    return reason or (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _has_adapter(class_name: str) -> bool:
    import diffusers

    names = {class_name} | {cls.__name__ for cls in getattr(getattr(diffusers, class_name, None), "__mro__", ())}
    families = (importlib.import_module(f"dit_sparse.pipelines.{name}").FAMILY for name in FAMILIES)
    return any(names & set(family.transformers) for family in families)


def _is_path(model: Any) -> bool:
    return os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") != 1 or "\0" in model
