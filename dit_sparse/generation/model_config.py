"""The config of a pipeline, ``model_index.json``: read and checked before weights are downloaded or loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dit_sparse.pipelines.family import class_names, family_named
from dit_sparse.pipelines.unsupported import why_unsupported

from ..bundled import BUNDLED, model_source
from ..grid import short_repr
from ..notation.reading import read_json, shorten_path

COUNTS = ("num_inference_steps", "num_frames", "height", "width")
CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json")
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


def pipeline_config(model: str, local_files_only: bool = False) -> dict:
    """Return ``model_index.json`` of a local folder or of a model on the hub. Nothing else is downloaded.

    Args:
        model: a local diffusers folder, or a name on the hub.
        local_files_only: read it from the cache of the hub, without a connection.

    Raises:
        ValueError: the file cannot be read or downloaded.
    """
    if not isinstance(model, str):
        raise ValueError(f"a model must be a name or a folder, got {short_repr(model)}")
    source = model_source(model)
    if _is_path(source):
        if not os.path.isfile(Path(source) / "model_index.json"):
            reason = "it is not a diffusers pipeline, because it has no model_index.json"
            raise ValueError(f"cannot load the model {shorten_path(source)}: {reason}")
        try:
            config = read_json(Path(source) / "model_index.json")
        except ValueError as error:
            raise ValueError(f"cannot load the model {shorten_path(model)}: {error}") from None
    else:
        from diffusers import DiffusionPipeline

        try:
            config = DiffusionPipeline.load_config(source, **({"local_files_only": True} if local_files_only else {}))
        except Exception as error:
            raise ValueError(f"cannot load the model {shorten_path(model)}: {failure_reason(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"cannot load the model {shorten_path(model)}: its model_index.json names no pipeline class")
    return config


def check_model(model: str) -> None:
    """Raise ValueError if a model is missing, or if no adapter supports it. The configs of the pipeline and of its
    transformer are downloaded, and no weights."""
    if model != BUNDLED:
        check_family(model, pipeline_config(model))
        _transformer_config(model, local_files_only=False)  # `frames_per_second` reads it from the cache


def check_family(model: str, config: dict) -> None:
    """Raise ValueError if no adapter supports a transformer of a pipeline, or if it generates images. Classes outside
    of diffusers are accepted, because they may be subclasses of supported ones."""
    name = shorten_path(model)
    components = [(key, part) for key, part in config.items() if isinstance(part, list) and len(part) == 2]
    transformers = [part for key, part in components if key.startswith("transformer") and part[1] is not None]
    if not transformers:
        raise ValueError(f"{name} is a {shorten_path(config['_class_name'])}, which has no video transformer")
    names = [_class_names(str(cls)) for library, cls in transformers if library == "diffusers"]
    families = [family_named(each) for each in names]
    class_name = shorten_path(str(transformers[0][1]))
    if len(names) == len(transformers) and not any(families):
        reason = why_unsupported(names[0])
        detail = f": {reason}" if reason else ""
        raise ValueError(f"{name} has a {class_name}, which no adapter in dit_sparse/pipelines supports{detail}")
    if any(family is not None and family.images for family in families):
        raise ValueError(f"{name} has a {class_name}, which generates images: use dit_sparse.enable in Python")


def frames_per_second(model: str) -> int | None:
    """Return the frames per second of the clips of a model, by the adapter of its transformer; None if they are
    unknown, or if the model is neither a local folder nor in the cache of the hub. Nothing is downloaded."""
    try:
        config = pipeline_config(model, local_files_only=True)
    except ValueError:
        return None
    family = family_named(_class_names(str(_last(config.get("transformer"), ""))))
    if family is None:
        return None
    return family.frames_per_second(config, _transformer_config(model, local_files_only=True))


def check_size(model: str, call: dict) -> None:
    """Raise ValueError if a model cannot generate clips of the size in a pipeline call, according to the configs of the
    bundled model or a local folder. Nothing is downloaded."""
    folder = Path(model_source(model))
    pipeline, transformer, vae = (read_config(folder / name) for name in CONFIGS)
    family = family_named(_class_names(str(_last(pipeline.get("transformer"), ""))))
    if family is None:
        return
    for name in ("height", "width"):
        if (call.get(name) or 0) % family.size_multiple:
            low = call[name] // family.size_multiple * family.size_multiple
            choices = " or ".join(str(size) for size in (low, low + family.size_multiple) if size)
            raise ValueError(
                f"{name} must be a multiple of {family.size_multiple} for {shorten_path(model)}, got {call[name]}: "
                f"choose {choices}"
            )
    limit, patch = transformer.get("rope_max_seq_len"), transformer.get("patch_size")
    if not isinstance(limit, int) or not isinstance(patch, list) or len(patch) != 3:
        return
    spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    for name, factor, tokens in zip(COUNTS[1:], (temporal, spatial, spatial), patch, strict=True):
        most = limit * factor * tokens
        if (call.get(name) or 0) > most:
            raise ValueError(f"{name} must be at most {most} for {shorten_path(model)}, got {call[name]}")


def failure_reason(error: BaseException) -> str:
    """Return the first line of an error; of a failed download, why it failed."""
    chain, current = [], error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    classes = {cls.__name__ for each in chain for cls in type(each).__mro__}
    reason = next((text for name, text in HUB_FAILURES.items() if name in classes), None)
    return reason or (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _class_names(class_name: str) -> set[str]:
    import diffusers

    cls = getattr(diffusers, class_name, None)
    return {class_name} | (class_names(cls) if isinstance(cls, type) else set())


def read_config(path: Path) -> dict:
    """Return a config, empty if it cannot be read: loading the model reports that."""
    try:
        config = read_json(path)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _transformer_config(model: str, local_files_only: bool) -> dict:
    """Return the config of a pipeline's transformer, empty if it cannot be read: loading the model reports that."""
    source = model_source(model)
    if _is_path(source):
        return read_config(Path(source) / CONFIGS[1])
    from diffusers import AutoModel

    try:
        return AutoModel.load_config(source, subfolder="transformer", local_files_only=local_files_only)
    except Exception:
        return {}


def _last(value: Any, default: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else default


def _is_path(model: Any) -> bool:
    return os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") != 1 or "\0" in model
