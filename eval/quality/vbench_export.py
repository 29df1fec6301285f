"""Clips under the names and with the lists that VBench's own tool reads, so that it scores them.

The tool (Z. Huang et al., CVPR 2024, arXiv:2311.17982; package ``vbench``) looks for ``{prompt}-{0..4}.mp4`` in one
folder that holds nothing but videos, and lists what it scores as ``{"prompt_en", "dimension", "video_list"}``.

    vbench evaluate --videos_path FOLDER/videos --full_json_dir FOLDER/full_info.json --dimension NAME
    vbench evaluate --videos_path FOLDER/videos --mode custom_input --prompt_file FOLDER/prompts.json --dimension NAME

The first form finds the videos by their names and warns where a prompt has fewer than 5. The second takes any names,
and is the one for prompts that cannot be file names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from numpy.typing import NDArray

from dit_sparse.eval.comparison.clip_store import ClipStore
from dit_sparse.output.files import atomic_write, for_json, to_uint8, writable_folder

Clips = Iterable[tuple[str, int, NDArray]]

ANY_PROMPT = (  # what a clip of any prompt can be scored on
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
)
OWN_PROMPTS = (  # what is meant for prompts of its own suite, which say what should be seen
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "temporal_style",
    "appearance_style",
)
LONGEST = 240  # bytes of a prompt in a name: 255 are allowed, less the index and what a draft adds
FORBIDDEN = str.maketrans({sign: "_" for sign in "/\\\0\n\r\t"})


def export(folder: Path | str, videos: Clips, fps: float = 8, dimensions: Iterable[str] = ANY_PROMPT) -> Path:
    """Writes ``videos/{prompt}-{index}.mp4``, ``full_info.json`` and ``prompts.json`` into ``folder``.

    Files appear whole or not at all. What lies there already is kept and extended, so that clips can be handed over as
    they are made, and a broken export repeated. Videos keep their size and nearly their pixels: H.264 without loss in
    4:4:4, off by the rounding of the colour space alone.

    Args:
        videos: ``(prompt, index, frames)``, frames ``[F, H, W, 3]``, uint8 or floats in 0..1; the tool reads the
            indices 0 to 4. May be a generator: one clip is held at a time.
        fps: frames a second, see `usual_fps`; the tool's own samples have 8.
        dimensions: what the tool is to score, by its names.

    Returns:
        ``full_info.json``.

    Raises:
        ValueError: the folder cannot be written, a dimension is unknown, a clip is no colour video, or another content
            lies under a name already.
    """
    dimensions = list(dimensions)
    unknown = [name for name in dimensions if name not in ANY_PROMPT + OWN_PROMPTS]
    if unknown:
        raise ValueError(f"VBench has no dimension {unknown[0]}; it has {', '.join(ANY_PROMPT + OWN_PROMPTS)}")
    folder = writable_folder(folder).resolve()
    place = writable_folder(folder / "videos")
    listed = {entry["prompt_en"]: entry for entry in _read(folder / "full_info.json", [])}
    prompts = _read(folder / "prompts.json", {})
    for prompt, index, frames in videos:
        entry = listed.setdefault(prompt, {"prompt_en": prompt, "dimension": dimensions, "video_list": []})
        if entry["dimension"] != dimensions:
            raise ValueError(f"{folder} lists other dimensions for the prompt {prompt!r}; choose another folder")
        path = place / file_name(prompt, index)
        _save(path, frames, fps)
        entry["video_list"] = sorted({*entry["video_list"], str(path)})
        prompts[path.name] = prompt
    for name, content in (("prompts.json", prompts), ("full_info.json", list(listed.values()))):
        with atomic_write(folder / name) as draft:
            draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder / "full_info.json"


def of_row(shelf: ClipStore, result: dict, row: dict) -> Clips:
    """The clips that a row of a comparison was measured on, one at a time. What other comparisons left on the shelf
    under the same name is told apart by its settings and, if need be, by the seconds that it took.

    Raises:
        ValueError: some are not there.
    """
    found: dict[tuple[str, int], list[tuple[int, float]]] = {
        (prompt, seed): [] for prompt in result["prompts"] for seed in range(result["seeds"])
    }
    for number, take in enumerate(shelf.takes()):
        note = for_json(take.note)
        scene = note.get("prompt"), note.get("seed")
        alike = all(note.get(key) == row[key] for key in ("settings", "steps"))
        if note.get("row") == row["name"] and alike and note["grids"] in ([], result["grids"]) and scene in found:
            found[scene].append((number, note["seconds"]))
    if missing := sum(not takes for takes in found.values()):
        raise ValueError(f"{missing} clips of {row['name']!r} are not in {shelf.folder}: run the comparison again")
    sets = [
        [takes[-min(back, len(takes))] for takes in found.values()]
        for back in range(1, 1 + max(map(len, found.values())))
    ]
    own = min(sets, key=lambda takes: abs(sum(seconds for _, seconds in takes) - row["seconds"]))
    numbers = {number for number, _ in own}
    for number, take in enumerate(shelf.takes()):
        if number in numbers:
            yield take.note["prompt"], take.note["seed"], take.frames


def file_name(prompt: str, index: int) -> str:
    """``{prompt}-{index}.mp4``. Signs that no file name bears become ``_``, and a prompt of more than 240 bytes is cut;
    both are then followed by ``~`` and 8 digits of the prompt's hash, so that no two prompts share a name."""
    if not prompt.strip() or index < 0:
        raise ValueError(f"a video is named by its prompt and an index from 0, not {prompt!r} and {index}")
    name = prompt.translate(FORBIDDEN)
    if name != prompt or len(name.encode()) > LONGEST:
        kept = name.encode()[: LONGEST - 9].decode(errors="ignore")
        name = f"{kept}~{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{name}-{index}.mp4"


def _read(path: Path, default: list | dict) -> list | dict:
    if not path.exists():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entries = found if isinstance(found, list) else []
        whole = all({"prompt_en", "dimension", "video_list"} <= set(entry) for entry in entries)
    except (OSError, ValueError, TypeError):
        whole, found = False, None
    if not whole or not isinstance(found, type(default)):
        raise ValueError(f"{path} is there already and is no list of VBench videos; choose another folder")
    return found


def _save(path: Path, frames: NDArray, fps: float) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"a clip for VBench is [frames, height, width, 3], not {list(frames.shape)}")
    with atomic_write(path) as draft:
        imageio.imwrite(
            draft,
            np.ascontiguousarray(to_uint8(frames)),
            fps=fps,
            codec="libx264",
            pixelformat="yuv444p",
            macro_block_size=1,
            quality=None,
            output_params=["-crf", "0"],
        )
        if path.exists() and path.read_bytes() != draft.read_bytes():
            raise ValueError(f"{path} is there already with another content; choose another folder")
