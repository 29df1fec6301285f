"""Files of trained gates: safetensors with one tensor ``[layers, heads, ...]`` for each parameter of each transformer,
named ``component/parameter``, and metadata that says what the gate was trained for and how.

    schema      integer version of the format
    gate        class name of the gate
    settings    JSON: the settings that the parameters depend on
    model       JSON: {"name", "transformer", "layers", "heads", "head_dim"}
    training    JSON: prompts, call, steps, seed, results on held-out prompts, device, versions and commit
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..grid import short_repr
from ..notation.reading import check_regular_file, shorten_path
from ..notation.settings import alternatives_to

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class GateWeights:
    """Parameters of a trained gate.

    Attributes:
        name: the file or bundled name, for messages.
        gate: class name of the gate.
        settings: settings that the parameters depend on.
        model: name of the model that the gate was trained on.
        transformer: class name of its transformer.
        layers, heads, head_dim: shape of the model.
        training: conditions and results of the training.
        tensors: parameters by ``component/parameter``, ``[layers, heads, ...]``.
        digest: of the content of the file, whose entries have no fixed order.
    """

    name: str
    gate: str
    settings: dict
    model: str
    transformer: str
    layers: int
    heads: int
    head_dim: int
    training: dict
    tensors: dict[str, Tensor]
    digest: str

    def layer(self, component: str, layer: int) -> dict[str, Tensor]:
        """Return the parameters of one layer of a transformer of the pipeline, ``[heads, ...]``.

        A file with the parameters of one transformer serves every transformer. Raises ValueError if the file has those
        of others.
        """
        components = sorted({name.partition("/")[0] for name in self.tensors})
        own = components[0] if len(components) == 1 else component
        if own not in components:
            raise ValueError(f"the weights {self.name} are for {', '.join(components)}, got {short_repr(component)}")
        parts = ((name.partition("/"), tensor) for name, tensor in self.tensors.items())
        return {parameter: tensor[layer] for (place, _, parameter), tensor in parts if place == own}

    def check_shape(self, **shape: int | None) -> None:
        """Raise ValueError if ``layers``, ``heads`` or ``head_dim`` of a model differ from those of the weights."""
        for name, number in shape.items():
            if number is not None and number != getattr(self, name):
                raise ValueError(
                    f"the weights {self.name} are for {self.model} with {name}={getattr(self, name)}, "
                    f"but this model has {name}={number}: train the gate on it with `dit-sparse train`"
                )

    def check_transformer(self, classes: tuple[str, ...]) -> None:
        """Raise ValueError if a transformer, given by the names of its class and base classes, is another one."""
        if self.transformer not in classes:
            raise ValueError(
                f"the weights {self.name} are for a {self.transformer}, got a {classes[0]}: "
                "train the gate on it with `dit-sparse train`"
            )

    def write(self, path: Path) -> None:
        """Write the file. Parameters are stored in float16."""
        from safetensors.torch import save

        model = {name: getattr(self, name) for name in ("transformer", "layers", "heads", "head_dim")}
        metadata = {"settings": self.settings, "model": {"name": self.model} | model, "training": self.training}
        metadata = {name: json.dumps(value) for name, value in metadata.items()}
        tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in self.tensors.items()}
        path.write_bytes(save(tensors, metadata | {"schema": str(SCHEMA), "gate": self.gate}))


def bundled_weights(gate: str) -> dict[str, Path]:
    """Return the bundled weights of a gate by name."""
    prefix = f"{gate.lower()}-"
    files = sorted((Path(__file__).parents[1] / "assets" / "gates").glob(f"{prefix}*.safetensors"))
    return {path.stem.removeprefix(prefix): path for path in files}


def weights_of(gate: str, name: str) -> GateWeights:
    """Return the weights of a gate by bundled name or path, read once for each version of the file.

    Raises:
        ValueError: there is no such file, or it is not one of ``dit-sparse train``.
    """
    bundled = bundled_weights(gate) if Path(name).suffix != ".safetensors" else {}
    if name not in bundled and Path(name).suffix != ".safetensors":
        known = alternatives_to(name, bundled) if bundled else "none are bundled for this gate"
        raise ValueError(f"weights must be a .safetensors file or a bundled name, got {short_repr(name)}; {known}")
    path = bundled.get(name, Path(name))
    return _read(path, check_regular_file(path).st_mtime_ns, name)


@lru_cache(maxsize=16)
def _read(path: Path, modified: int, name: str) -> GateWeights:
    """Read a file. ``modified`` makes a new version a new entry of the cache."""
    from safetensors import SafetensorError, safe_open

    shown = shorten_path(name)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights {shown} cannot be read: {str(error).splitlines()[0][:100]}") from None
    if metadata.get("schema") != str(SCHEMA):
        found = short_repr(metadata.get("schema"))
        raise ValueError(f"weights {shown} must be a file of `dit-sparse train` with schema {SCHEMA}, got {found}")
    try:
        settings, model, training = (json.loads(metadata[part]) for part in ("settings", "model", "training"))
        shape = {part: int(model[part]) for part in ("layers", "heads", "head_dim")}
        loaded = GateWeights(
            shown, metadata["gate"], settings, model["name"], model["transformer"], **shape, training=training,
            tensors=tensors, digest=_digest(metadata, tensors),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"weights {shown} are damaged: {short_repr(error)}") from None
    expected = [shape["layers"], shape["heads"]]
    if wrong := next((key for key, tensor in tensors.items() if list(tensor.shape[:2]) != expected), None):
        raise ValueError(f"weights {shown} are damaged: {short_repr(wrong)} is not [{expected[0]}, {expected[1]}, ...]")
    return loaded


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]
