"""The training of a gate: generate clips, store examples, distil, measure on held-out prompts, write the weights.

Examples and the state of the training are stored in a folder next to the output, so that the same command resumes an
interrupted training. The folder is removed at the end.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dit_sparse import Schedule, enable, prepare
from dit_sparse.pipelines.family import family_of

from ..gating.gate import Gate
from ..gating.weights import GateWeights
from ..generation.checks import check_clip, check_seed
from ..generation.generate import Progress, default_call, generate, load_pipeline
from ..methods import method, method_text
from ..methods.gates import GATES
from ..notation.reading import shorten_path
from ..output.environment import conditions, weights_digest
from ..output.files import atomic_write, save_json, writable_file, writable_folder
from ..profiling.probe import measured_steps
from .distillation import TrainingState, best_mass, group, kept_mass, train
from .examples import Capture, Example, Recorder

MAX_BYTES = 1 << 30  # of all examples
MAX_ITERATIONS = 1_000_000
SAVE_INTERVAL = 50  # iterations
DENSITIES = (0.15, 0.25)  # at which the report gives the kept attention mass

Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class GateTraining:
    """A training of a gate. All arguments are checked before any long work.

    Attributes:
        gate: text of the gate, such as ``seer`` or ``seer(rank=4)``.
        model: the bundled model, a local diffusers folder, or a name on the Hugging Face hub.
        prompts: a clip is generated from each, with seeds ``seed``, ``seed + 1``, ...
        out: the .safetensors file to write.
        held_out: number of the last prompts that the gate is measured on and not trained on; None: a quarter.
        iterations: steps of the optimizer.
        sampled_steps: denoising steps of each clip to learn from, evenly spread over the sparse ones.
        seed: of the first clip, and of the choice of examples.
        schedule: steps that it keeps dense are not learned from.
        block: tokens in a block.
        call: arguments of the pipeline call.

    Raises:
        ValueError: an argument is unknown or out of range.
    """

    gate: str
    model: str
    prompts: Sequence[str]
    out: Path
    held_out: int | None = None
    iterations: int = 400
    sampled_steps: int = 3
    seed: int = 0
    schedule: Schedule = Schedule()  # noqa: RUF009
    block: int | None = None
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parse_gate()
        if self.held_out is None:
            object.__setattr__(self, "held_out", max(1, len(self.prompts) // 4))
        if not 1 <= self.held_out < len(self.prompts):
            raise ValueError(
                f"a training needs at least one prompt and one held-out prompt, got {len(self.prompts)} prompts "
                f"of which {self.held_out} are held out"
            )
        if not 1 <= self.iterations <= MAX_ITERATIONS:
            raise ValueError(f"iterations must be in [1, {MAX_ITERATIONS}], got {self.iterations}")
        if self.sampled_steps < 1:
            raise ValueError(f"sampled_steps must be at least 1, got {self.sampled_steps}")
        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {shorten_path(self.out)}")
        check_seed(self.seed + len(self.prompts))
        object.__setattr__(self, "call", default_call(self.model, small=True) | self.call)
        for prompt in self.prompts:
            check_clip(prompt, self.seed, self.call, model=self.model)
        if steps := self.call.get("num_inference_steps"):
            measured_steps(self.schedule, steps, self.sampled_steps)
        writable_file(self.out)

    def run(self, stage: Stage) -> dict:
        """Train the gate and write its weights.

        Args:
            stage: returns a progress callback for a named stage.

        Returns:
            What the file stores about the training: conditions, and the kept attention mass on held-out prompts.

        Raises:
            ValueError: the folder of an interrupted training belongs to another one, or no call can be sparse.
        """
        gate = self._parse_gate()
        self._open_folder()
        examples, model = self._examples(gate, stage("capturing"))
        trained, held_out = (group(part) for part in examples)
        state = TrainingState.create(gate, sorted({example.component for example in examples[0]}), *model["shape"])
        measure = lambda: {str(density): round(kept_mass(gate, held_out, state, density), 4) for density in DENSITIES}
        kept = {"best": {str(d): round(best_mass(held_out, d), 4) for d in DENSITIES}, "untrained": measure()}
        losses = self._train(gate, state, trained, stage("training"))
        kept["trained"] = measure()
        training = self._settings() | {"kept_mass": kept, "last_loss": losses} | conditions()
        layers, heads, head_dim = model["shape"]
        weights = GateWeights(
            self.out.name, type(gate).__name__, gate.shape_settings(), Path(self.model).name, model["transformer"],
            layers, heads, head_dim, training, state.parameters, digest="",
        )  # fmt: skip
        with atomic_write(self.out) as file:
            weights.write(file)
        shutil.rmtree(self.folder)
        return training

    @property
    def folder(self) -> Path:
        """Folder of the examples and the state of the training."""
        return self.out.with_suffix(".training")

    def _parse_gate(self) -> Gate:
        gate = method(self.gate)
        if not isinstance(gate, Gate):
            raise ValueError(f"{self.gate[:60]} has nothing to train; the gates are {', '.join(GATES)}")
        if (gate.weights, gate.density, gate.budget) != (None, None, None):
            raise ValueError("a gate is trained without weights, density or budget: leave them out")
        return gate

    def _settings(self) -> dict:
        """Return everything that determines the result, as JSON values."""
        names = ("prompts", "held_out", "iterations", "sampled_steps", "seed", "block", "call")
        values = {name: getattr(self, name) for name in names} | {"prompts": list(self.prompts)}
        return values | {
            "gate": method_text(self._parse_gate()),
            "model": self.model,
            "schedule": asdict(self.schedule),
        }

    def _open_folder(self) -> None:
        """Create the folder, or check that it belongs to this training."""
        settings = self._settings() | {"weights": weights_digest(self.model)}
        file = writable_folder(self.folder) / "settings.json"
        if not file.exists():
            save_json(file, settings)
        if json.loads(file.read_text()) != json.loads(json.dumps(settings)):
            raise ValueError(
                f"{shorten_path(self.folder)} holds another interrupted training: remove it, or choose another --out"
            )

    def _examples(self, gate: Gate, progress: Progress) -> tuple[tuple[list[Example], list[Example]], dict]:
        """Return the examples of the prompts to train on and of the others, and what is stored about the model."""
        parts: tuple[list[Example], list[Example]] = ([], [])
        for number in range(len(self.prompts)):
            file = self.folder / f"prompt-{number:04d}.pt"
            if not file.exists():
                clip = self._capture(gate, number, progress)
                with atomic_write(file) as temporary:
                    torch.save(clip, temporary)
            clip = torch.load(file, weights_only=True)
            parts[number >= len(self.prompts) - self.held_out].extend(Example(**one) for one in clip["examples"])
        return parts, clip["model"]

    def _capture(self, gate: Gate, number: int, progress: Progress) -> dict:
        """Generate the clip of a prompt densely, and return its examples and what identifies the model."""
        steps = self.call.get("num_inference_steps", self._default_steps)
        sampled = tuple(sorted(set(measured_steps(self.schedule, steps, self.sampled_steps))))
        recorder = Recorder(MAX_BYTES // len(self.prompts), number, sampled)
        on_step = lambda step, steps: progress(number * steps + step, len(self.prompts) * steps)
        every_step = Schedule(dense_steps=0, replan_interval=1)
        capture = Capture(gate=gate, recorder=recorder)
        with enable(self._pipe, capture, schedule=every_step, min_tokens=0, block=self.block):
            generate(self._pipe, self.prompts[number], self.seed + number, self.call, on_step)
        if not recorder.examples:
            raise ValueError(f"no attention call of {self.model} can be sparse, so there is nothing to learn from")
        parts = self._pipe.components.items()
        transformer = next(part for name, part in parts if name.startswith("transformer") and family_of(part))
        model = {"shape": list(recorder.shape), "transformer": type(transformer).__name__}
        return {"examples": [example.to_dict() for example in recorder.examples], "model": model}

    @cached_property
    def _pipe(self) -> Any:
        return prepare(load_pipeline(self.model))

    @property
    def _default_steps(self) -> int:
        return inspect.signature(type(self._pipe).__call__).parameters["num_inference_steps"].default

    def _train(self, gate: Gate, state: TrainingState, groups: dict, progress: Progress) -> float:
        """Train, and store the state every few iterations. Returns the mean loss of the last ones."""
        file, losses = self.folder / "state.pt", []
        if file.exists():
            state.restore(torch.load(file, weights_only=True))

        def after_step(state: TrainingState, loss: float) -> None:
            losses.append(loss)
            progress(state.step, self.iterations)
            if state.step % SAVE_INTERVAL == 0:
                with atomic_write(file) as temporary:
                    torch.save(state.to_dict(), temporary)

        train(gate, state, groups, self.iterations, self.seed, after_step)
        last = losses[-SAVE_INTERVAL:]
        return round(sum(last) / max(1, len(last)), 4)
