"""Export of clips with the file names and lists that VBench's own tool reads.

The tool (Z. Huang et al., CVPR 2024, arXiv:2311.17982; package ``vbench``) looks for ``{prompt}-{0..4}.mp4`` in a
folder that contains only videos, and lists what it scores as ``{"prompt_en", "dimension", "video_list"}``.

    vbench evaluate --videos_path FOLDER/videos --full_json_dir FOLDER/full_info.json --dimension NAME
    vbench evaluate --videos_path FOLDER/videos --mode custom_input --prompt_file FOLDER/prompts.json --dimension NAME

The first form finds videos by name and warns if a prompt has fewer than 5. The second accepts any names; use it for
prompts that are not valid file names.
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
from dit_sparse.eval.comparison.row_clips import paths_of_row
from dit_sparse.notation.reading import read_json
from dit_sparse.output.files import atomic_write, to_uint8, writable_folder
from dit_sparse.output.media import check_video

Clips = Iterable[tuple[str, int, NDArray]]

ANY_PROMPT = (  # dimensions that apply to clips of any prompt
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
)
SUITE_PROMPTS = (  # dimensions that apply to prompts of VBench's suite, which state what must be visible
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "temporal_style",
    "appearance_style",
)
MAX_PROMPT_BYTES = 240  # of a file name: 255 bytes are allowed, and the index and a draft's prefix need the rest
FORBIDDEN = str.maketrans({sign: "_" for sign in "/\\\0\n\r\t"})


def export(folder: Path | str, videos: Clips, fps: float = 8, dimensions: Iterable[str] = ANY_PROMPT) -> Path:
    """Write ``videos/{prompt}-{index}.mp4``, ``full_info.json`` and ``prompts.json`` into a folder.

    Files are written atomically. An existing export is extended, so clips can be added as they are generated and an
    interrupted export can be repeated. Videos keep their size and are encoded losslessly as H.264 in 4:4:4; pixels
    change only by the rounding of the color space.

    Args:
        folder: the folder; created if it is missing.
        videos: ``(prompt, index, frames)`` with frames ``[F, H, W, 3]``, uint8 or floats in [0, 1]. The tool reads the
            indices 0 to 4. A generator keeps one clip in memory at a time.
        fps: frame rate, see `default_fps`; the tool's samples have 8.
        dimensions: names of the dimensions that the tool scores.

    Returns:
        The path of ``full_info.json``.

    Raises:
        ValueError: the folder is not writable, a dimension is unknown, a clip is no color video, or a file exists with
            different content.
    """
    dimensions = list(dimensions)
    if unknown := next((name for name in dimensions if name not in ANY_PROMPT + SUITE_PROMPTS), None):
        raise ValueError(f"VBench has no dimension {unknown}; it has {', '.join(ANY_PROMPT + SUITE_PROMPTS)}")
    folder = writable_folder(folder).resolve()
    video_folder = writable_folder(folder / "videos")
    entries = {entry["prompt_en"]: entry for entry in _read_list(folder / "full_info.json", [])}
    prompts = _read_list(folder / "prompts.json", {})
    for prompt, index, frames in videos:
        entry = entries.setdefault(prompt, {"prompt_en": prompt, "dimension": dimensions, "video_list": []})
        if entry["dimension"] != dimensions:
            raise ValueError(f"{folder} lists other dimensions for the prompt {prompt!r}; choose another folder")
        path = video_folder / file_name(prompt, index)
        _save_video(path, frames, fps)
        entry["video_list"] = sorted({*entry["video_list"], str(path)})
        prompts[path.name] = prompt
    for name, content in (("prompts.json", prompts), ("full_info.json", list(entries.values()))):
        with atomic_write(folder / name) as draft:
            draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder / "full_info.json"


def clips_of_row(store: ClipStore, result: dict, row: dict) -> Clips:
    """Yield prompt, seed and frames of the clips that a row of a comparison was measured on, one at a time.

    Raises:
        ValueError: clips are missing.
    """
    for sample, path in paths_of_row(store.index(), result, row).items():
        if (clip := store.load(path)) is not None:
            yield *sample, clip.frames


def file_name(prompt: str, index: int) -> str:
    """Return ``{prompt}-{index}.mp4`` as a valid file name.

    Characters that file names cannot contain become ``_``, and prompts over 240 bytes are truncated. In both cases
    ``~`` and 8 hexadecimal digits of the prompt's hash follow, so that file names stay unique.
    """
    if not prompt.strip() or index < 0:
        raise ValueError(f"a video needs a prompt and an index of at least 0, got {prompt!r} and {index}")
    name = prompt.translate(FORBIDDEN)
    if name != prompt or len(name.encode()) > MAX_PROMPT_BYTES:
        truncated = name.encode()[: MAX_PROMPT_BYTES - 9].decode(errors="ignore")
        name = f"{truncated}~{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{name}-{index}.mp4"


def _read_list(path: Path, default: list | dict) -> list | dict:
    """Read a list of an earlier export; return ``default`` if there is none."""
    if not path.exists():
        return default
    try:
        content = read_json(path)
        entries = content if isinstance(content, list) else []
        valid = all({"prompt_en", "dimension", "video_list"} <= set(entry) for entry in entries)
    except (OSError, ValueError, TypeError):
        valid, content = False, None
    if not valid or not isinstance(content, type(default)):
        raise ValueError(f"{path} exists and is not a list of VBench videos; choose another folder")
    return content


def _save_video(path: Path, frames: NDArray, fps: float) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"a clip for VBench must be [frames, height, width, 3], got {list(frames.shape)}")
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
        check_video(draft, len(frames))
        if path.exists() and path.read_bytes() != draft.read_bytes():
            raise ValueError(f"{path} exists with different content; choose another folder")
