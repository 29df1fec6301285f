"""Features and scores of frames by pretrained models whose weights are on this machine; nothing is downloaded.

Missing weights raise ``Unavailable`` with the command that downloads them. A model is loaded once per process, on a GPU
if there is one. Frames are ``[F, H, W, C]`` floats in [0, 1]; grey ones are repeated to three channels. As in VBench's
own tool, they are resized without smoothing (torchvision's ``antialias=False``).
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

from .unavailable import Unavailable, display_path

DINO = "facebook/dino-vitb16"
CLIP_BASE = "openai/clip-vit-base-patch32"
CLIP_LARGE = "openai/clip-vit-large-patch14"
MUSIQ = "musiq_spaq_ckpt-358bb6af.pth"
MUSIQ_URL = f"https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/{MUSIQ}"
AESTHETIC = "sa_0_4_vit_l_14_linear.pth"
AESTHETIC_URL = f"https://github.com/LAION-AI/aesthetic-predictor/raw/main/{AESTHETIC}"

IMAGE_SIDE = 224  # input size of DINO and CLIP
MUSIQ_SIDE = 512
DINO_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BATCH = 32


def vbench_cache() -> Path:
    """Return the folder in which VBench's own tool stores weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def dino_features(video: NDArray) -> Tensor:
    """Return the class token of DINO ViT-B/16, ``[F, 768]``, of whole frames with the shorter side at 224 pixels."""
    from transformers import ViTModel

    model = _load_local(ViTModel, DINO, add_pooling_layer=False)
    images = (_normalize(_resize_shorter_side(x, "bilinear"), DINO_MEAN_STD) for x in _batches(video))
    with torch.no_grad():
        tokens = [model(x, interpolate_pos_encoding=True).last_hidden_state[:, 0].cpu() for x in images]
    return torch.cat(tokens)


def clip_image_features(video: NDArray, repo: str) -> Tensor:
    """Return CLIP's embedding of each frame, ``[F, D]``: shorter side to 224 pixels, bicubic, center crop."""
    from transformers import CLIPVisionModelWithProjection

    model = _load_local(CLIPVisionModelWithProjection, repo)
    images = (_normalize(_center_crop(_resize_shorter_side(x, "bicubic")), CLIP_MEAN_STD) for x in _batches(video))
    with torch.no_grad():
        return torch.cat([model(x).image_embeds.cpu() for x in images])


def clip_text_features(prompt: str, repo: str) -> Tensor:
    """Return CLIP's embedding of a prompt, ``[1, D]``, truncated to 77 tokens."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model, tokenizer = _load_local(CLIPTextModelWithProjection, repo), _load_local(CLIPTokenizer, repo)
    tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt").to(_device())
    with torch.no_grad():
        return model(**tokens).text_embeds.cpu()


def aesthetic_scores(features: Tensor) -> Tensor:
    """Return the scores of LAION's linear head for unit CLIP ViT-L/14 embeddings ``[F, 768]``: ``[F]``, about 0..10."""
    path = _vbench_weights("aesthetic_model/emb_reader", AESTHETIC, AESTHETIC_URL)
    head = torch.load(path, map_location="cpu", weights_only=True)
    return F.linear(features, head["weight"], head["bias"]).squeeze(-1)


def musiq_scores(video: NDArray) -> list[float]:
    """Return the score of MUSIQ trained on SPAQ for each frame, 0..100 (J. Ke et al., ICCV 2021, arXiv:2108.05997).

    Frames whose longer side exceeds 512 pixels are reduced to that.
    """
    model = _musiq_model()
    scores = []
    with torch.no_grad():
        for frames in _batches(video, 1):
            height, width = frames.shape[2:]
            if max(height, width) > MUSIQ_SIDE:
                scale = MUSIQ_SIDE / max(height, width)
                frames = F.interpolate(frames, (int(scale * height), int(scale * width)), mode="bilinear")
            scores.append(float(model(frames)))
    return scores


@lru_cache(maxsize=1)
def _musiq_model() -> torch.nn.Module:
    try:
        from pyiqa.archs.musiq_arch import MUSIQ as Model
    except ImportError as error:
        raise Unavailable(f"the package {error.name} is not installed; get it with: pip install pyiqa") from None
    path = _vbench_weights("pyiqa_model", MUSIQ, MUSIQ_URL)
    return Model(pretrained_model_path=str(path)).eval().to(_device())


@lru_cache(maxsize=8)
def _load_local(cls: Any, repo: str, **settings: Any) -> Any:
    """Load a transformers model or tokenizer from the local Hugging Face cache."""
    try:
        loaded = cls.from_pretrained(repo, local_files_only=True, **settings)
    except OSError:
        raise Unavailable(
            f"the files of {repo} are not in the local Hugging Face cache; get them with: hf download {repo}"
        ) from None
    return loaded.eval().to(_device()) if isinstance(loaded, torch.nn.Module) else loaded


def _vbench_weights(folder: str, name: str, url: str) -> Path:
    path = vbench_cache() / folder / name
    if not path.is_file():
        command = f"wget -P {display_path(path.parent)} {url}"
        raise Unavailable(f"the weights {display_path(path)} are missing; get them with: {command}")
    return path


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _batches(video: NDArray, size: int = BATCH) -> Iterator[Tensor]:
    """Yield batches of frames, float32 ``[F, 3, H, W]``."""
    for start in range(0, len(video), size):
        frames = torch.from_numpy(np.ascontiguousarray(video[start : start + size])).permute(0, 3, 1, 2)
        yield frames.float().expand(-1, 3, -1, -1).to(_device())


def _resize_shorter_side(frames: Tensor, mode: str) -> Tensor:
    height, width = frames.shape[2:]
    short = min(height, width)
    size = (IMAGE_SIDE * height // short, IMAGE_SIDE * width // short)
    # Bicubic interpolation overshoots; VBench's tool resizes bytes, which cannot.
    return F.interpolate(frames, size, mode=mode).clamp(0, 1)


def _center_crop(frames: Tensor) -> Tensor:
    top, left = (round((side - IMAGE_SIDE) / 2) for side in frames.shape[2:])
    return frames[:, :, top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]


def _normalize(frames: Tensor, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(x, device=frames.device).view(3, 1, 1) for x in mean_std)
    return (frames - mean) / std
