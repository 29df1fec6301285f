"""Clips of several methods for the same prompts and seeds: a folder of `dit-sparse compare`, or a folder per method."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from numpy.typing import NDArray

from dit_sparse.eval.comparison.clip_store import ClipStore
from dit_sparse.eval.comparison.result_schema import read_result
from dit_sparse.eval.comparison.row_clips import paths_of_row
from dit_sparse.generation.generate import default_fps
from dit_sparse.output.media import read_video

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")


class PromptSeed(NamedTuple):
    """Prompt and seed of clips that can be compared; the seed is None if it is unknown."""

    prompt: str
    seed: int | None


class Video(NamedTuple):
    """Frames ``[F, H, W, 3]`` uint8, and frames per second."""

    frames: NDArray
    fps: float


@dataclass(frozen=True)
class ClipSource:
    """Clips of several methods.

    Attributes:
        clips: a function that reads the clip, by method and then by prompt and seed.
    """

    clips: Mapping[str, Mapping[PromptSeed, Callable[[], Video]]]

    @property
    def methods(self) -> list[str]:
        return list(self.clips)

    def samples_of(self, one: str, other: str) -> list[PromptSeed]:
        """Return the prompts and seeds of which both methods have a clip."""
        return [sample for sample in self.clips[one] if sample in self.clips[other]]

    def read(self, method: str, sample: PromptSeed) -> Video:
        return self.clips[method][sample]()


def read_clip_source(folder: Path, rows: Sequence[str] = ()) -> ClipSource:
    """Return the clips in a folder.

    Args:
        folder: a folder of `dit-sparse compare`, or one that contains a folder of videos for each method. There, videos
            of the same file name belong to the same prompt and seed; a name such as ``a cat-3.mp4`` is read as prompt
            and seed.
        rows: rows of the comparison, or folders; none: all of them.

    Raises:
        ValueError: the folder has no clips, a row is missing, or no two methods have a clip of the same name.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    compared = (folder / "compare.json").is_file()
    clips = _clips_of_comparison(folder, rows) if compared else _clips_of_folders(folder, rows)
    source = ClipSource(clips)
    names = source.methods
    if not any(source.samples_of(a, b) for i, a in enumerate(names) for b in names[:i]):
        raise ValueError(
            f"{folder} has no two clips to compare: give a folder of dit-sparse compare, or one with a folder of "
            "videos for each method, in which videos of the same prompt and seed have the same file name"
        )
    return source


def _clips_of_comparison(folder: Path, rows: Sequence[str]) -> dict[str, dict[PromptSeed, Callable[[], Video]]]:
    result = read_result(folder / "compare.json")
    if not (folder / "clips").is_dir():
        raise ValueError(f"{folder} has no clips: run `dit-sparse compare` with this folder again")
    store, fps = ClipStore(folder / "clips"), default_fps(result["model"])
    by_name = {row["name"]: row for row in result["rows"]}
    index = store.index()

    def reader(path: Path) -> Callable[[], Video]:
        def read() -> Video:
            clip = store.load(path)
            if clip is None:
                raise ValueError(f"{path} is damaged: remove it and run the comparison again")
            return Video(clip.frames, fps)

        return read

    return {
        name: {PromptSeed(*sample): reader(path) for sample, path in paths_of_row(index, result, by_name[name]).items()}
        for name in _selected(rows, list(by_name))
    }


def _clips_of_folders(folder: Path, rows: Sequence[str]) -> dict[str, dict[PromptSeed, Callable[[], Video]]]:
    found: dict[str, dict[PromptSeed, Callable[[], Video]]] = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        videos = sorted(path for path in inner.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
        readers = {_sample_of(path.stem): lambda path=path: Video(*read_video(path)) for path in videos}
        if readers:
            found[inner.name] = readers
    return {name: found[name] for name in _selected(rows, list(found))}


def _selected(rows: Sequence[str], names: list[str]) -> list[str]:
    if missing := next((row for row in rows if row not in names), None):
        raise ValueError(f"there is no row {missing!r}; there are {', '.join(names)}")
    return list(dict.fromkeys(rows)) or names


def _sample_of(stem: str) -> PromptSeed:
    match = re.fullmatch(r"(.*\S)-(\d+)", stem)
    return PromptSeed(match[1], int(match[2])) if match else PromptSeed(stem, None)
