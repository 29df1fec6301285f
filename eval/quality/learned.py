"""Features of frames by learned models, of weights that already lie on this machine; nothing is ever downloaded.

What is missing raises ``Unavailable`` with the command that gets it. A model is loaded once per process, on a GPU if
there is one. Frames are ``[F, H, W, C]`` floats in 0..1; grey ones are repeated to three channels. They are resized as
VBench's own tool does it, without smoothing before (torchvision's ``antialias=False``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .fidelity import Unavailable, shown

DINO = "facebook/dino-vitb16"
CLIP_BASE = "openai/clip-vit-base-patch32"
CLIP_LARGE = "openai/clip-vit-large-patch14"
MUSIQ = "musiq_spaq_ckpt-358bb6af.pth"
MUSIQ_FROM = f"https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/{MUSIQ}"
AESTHETIC = "sa_0_4_vit_l_14_linear.pth"
AESTHETIC_FROM = f"https://github.com/LAION-AI/aesthetic-predictor/raw/main/{AESTHETIC}"

SIDE = 224  # the models' pictures
DINO_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BATCH = 32


def vbench_cache() -> Path:
    """Where VBench's own tool keeps its weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def dino(video: NDArray) -> Tensor:
    """The class token of DINO ViT-B/16, ``[F, 768]``, of whole frames with the shorter side at 224 pixels."""
    from transformers import ViTModel

    model = _local(ViTModel, DINO, add_pooling_layer=False)
    pictures = (_coloured(_shorter_side(x, "bilinear"), DINO_COLOURS) for x in _batches(video))
    with torch.no_grad():
        tokens = [model(x, interpolate_pos_encoding=True).last_hidden_state[:, 0].cpu() for x in pictures]
    return torch.cat(tokens)


def clip_image(video: NDArray, repo: str) -> Tensor:
    """CLIP's embedding of each frame, ``[F, D]``: shorter side to 224 pixels, bicubic, the square in the middle."""
    from transformers import CLIPVisionModelWithProjection

    model = _local(CLIPVisionModelWithProjection, repo)
    pictures = (_coloured(_middle(_shorter_side(x, "bicubic")), CLIP_COLOURS) for x in _batches(video))
    with torch.no_grad():
        return torch.cat([model(x).image_embeds.cpu() for x in pictures])


def clip_text(prompt: str, repo: str) -> Tensor:
    """CLIP's embedding of a prompt, ``[1, D]``, cut to its 77 tokens."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model, tokenizer = _local(CLIPTextModelWithProjection, repo), _local(CLIPTokenizer, repo)
    tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt").to(_device())
    with torch.no_grad():
        return model(**tokens).text_embeds.cpu()


def aesthetic_rating(features: Tensor) -> Tensor:
    """LAION's linear head on unit CLIP ViT-L/14 embeddings ``[F, 768]``: ratings ``[F]``, about 0..10."""
    path = _weights("aesthetic_model/emb_reader", AESTHETIC, AESTHETIC_FROM)
    head = torch.load(path, map_location="cpu", weights_only=True)
    return F.linear(features, head["weight"], head["bias"]).squeeze(-1)


def musiq(video: NDArray) -> list[float]:
    """MUSIQ trained on SPAQ, 0..100 a frame (J. Ke et al., ICCV 2021, arXiv:2108.05997); frames whose longer side
    exceeds 512 pixels are reduced to that."""
    model = _musiq_model()
    ratings = []
    with torch.no_grad():
        for frames in _batches(video, 1):
            height, width = frames.shape[2:]
            if max(height, width) > 512:
                scale = 512 / max(height, width)
                size = (int(scale * height), int(scale * width))
                frames = F.interpolate(frames, size, mode="bilinear")
            ratings.append(float(model(frames)))
    return ratings


@lru_cache(maxsize=1)
def _musiq_model() -> torch.nn.Module:
    try:
        from pyiqa.archs.musiq_arch import MUSIQ as Model
    except ImportError as error:
        raise Unavailable(f"the package {error.name} is not installed; get it with: pip install pyiqa") from None
    path = _weights("pyiqa_model", MUSIQ, MUSIQ_FROM)
    return Model(pretrained_model_path=str(path)).eval().to(_device())


@lru_cache(maxsize=8)
def _local(kind: Any, repo: str, **settings: Any) -> Any:
    """A model or tokenizer of transformers from the local Hugging Face cache."""
    try:
        loaded = kind.from_pretrained(repo, local_files_only=True, **settings)
    except OSError:
        raise Unavailable(
            f"the files of {repo} are not in the local Hugging Face cache; get them with: hf download {repo}"
        ) from None
    return loaded.eval().to(_device()) if isinstance(loaded, torch.nn.Module) else loaded


def _weights(folder: str, name: str, source: str) -> Path:
    path = vbench_cache() / folder / name
    if not path.is_file():
        fetch = f"wget -P {shown(path.parent)} {source}"
        raise Unavailable(f"the weights {shown(path)} are not there; get them with: {fetch}")
    return path


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _batches(video: NDArray, size: int = BATCH) -> Iterator[Tensor]:
    for start in range(0, len(video), size):
        frames = torch.from_numpy(np.ascontiguousarray(video[start : start + size])).permute(0, 3, 1, 2)
        yield frames.float().expand(-1, 3, -1, -1).to(_device())


def _shorter_side(frames: Tensor, mode: str) -> Tensor:
    height, width = frames.shape[2:]
    short = min(height, width)
    size = (SIDE * height // short, SIDE * width // short)
    return F.interpolate(frames, size, mode=mode).clamp(0, 1)  # bicubic overshoots, and the tool's bytes cannot


def _middle(frames: Tensor) -> Tensor:
    top, left = (round((side - SIDE) / 2) for side in frames.shape[2:])
    return frames[:, :, top : top + SIDE, left : left + SIDE]


def _coloured(frames: Tensor, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(x, device=frames.device).view(3, 1, 1) for x in colours)
    return (frames - mean) / deviation
