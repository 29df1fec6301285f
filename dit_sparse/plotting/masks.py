"""What a mask looks like, and how much attention it keeps: pictures and their terminal cousins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_sparse import Grid, Plan

INK, PAPER, KEPT, DROPPED, QUERY = (32, 36, 44), (250, 250, 248), (38, 93, 168), (224, 228, 234), (222, 92, 52)
LIGHT = (168, 180, 196)
MARGIN = 24


def mask_picture(plan: Plan, grid: Grid, title: str) -> Image.Image:
    """Left the block map of the first head; right, frame by frame, the keys that one query in the middle sees."""
    side = 480
    blocks = _enlarged(_shade(plan.block_mask()[0, 0].numpy().astype(float)), side, side)
    seen = _seen_from_the_middle(plan, grid)
    frames = _montage(seen, grid, side)
    width = 3 * MARGIN + blocks.width + frames.width
    picture = Image.new("RGB", (width, side + 3 * MARGIN + 20), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN // 2), f"{title}   {grid}   density {plan.density:.3f}", INK, _font(16))
    top = 2 * MARGIN
    picture.paste(blocks, (MARGIN, top))
    picture.paste(frames, (2 * MARGIN + blocks.width, top))
    caption = top + side + 6
    rows, columns = plan.block_mask().shape[-2:]
    draw.text((MARGIN, caption), f"{rows} blocks of queries (down) x {columns} blocks of keys", INK, _font(13))
    draw.text((2 * MARGIN + blocks.width, caption), "keys seen by one query (orange), frame by frame", INK, _font(13))
    return picture


def heat_map(
    values: Tensor, title: str, labels: Sequence[str] | None = None, legend: Sequence[str] = ()
) -> Image.Image:
    """``values [rows, columns]`` in 0..1 as a picture with its numbers: layers down, heads across. ``labels`` stand
    before the numbers: a string a layer, a letter a head; the lines of the ``legend`` stand below."""
    rows, columns = values.shape
    cell_width, cell_height, left, top = 64, 34, 84, 64
    bottom = top + rows * cell_height + MARGIN // 2
    width = max(
        left + columns * cell_width, 436, *(int(_font(16).getlength(line)) + MARGIN for line in (title, *legend))
    )
    size = (width + MARGIN, bottom + 20 * len(legend) + MARGIN // 2)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 12), title, INK, _font(16))
    for column in range(columns):
        draw.text((left + (column + 0.5) * cell_width, top - 12), f"head {column}", INK, _font(12), anchor="mm")
    for number, line in enumerate(legend):
        draw.text((MARGIN, bottom + 20 * number), line, INK, _font(13))
    for row in range(rows):
        y = top + row * cell_height
        draw.text((left - 8, y + cell_height / 2), f"layer {row}", INK, _font(12), anchor="rm")
        for column in range(columns):
            value, x = float(values[row, column]), left + column * cell_width
            draw.rectangle((x, y, x + cell_width - 3, y + cell_height - 3), fill=_blend(value))
            ink = PAPER if value > 0.5 else INK
            label = f"{labels[row][column]} " if labels else ""
            middle = (x + cell_width / 2 - 1, y + cell_height / 2 - 1)
            draw.text(middle, f"{label}{value:.2f}", ink, _font(13), anchor="mm")
    return picture


def side_by_side(left: NDArray, right: NDArray, labels: tuple[str, str]) -> NDArray:
    """Two clips ``[F, H, W, 3]`` uint8 next to each other, enlarged by whole pixels, a label above each."""
    scale = max(1, -(-384 // left.shape[1]))
    bar, gap = 28, 8
    frames = []
    for pair in zip(left, right, strict=True):
        large = [frame.repeat(scale, 0).repeat(scale, 1) for frame in pair]
        height, width = large[0].shape[:2]
        canvas = Image.new("RGB", (2 * width + gap, height + bar), PAPER)
        draw = ImageDraw.Draw(canvas)
        for place, (frame, label) in enumerate(zip(large, labels, strict=True)):
            x = place * (width + gap)
            canvas.paste(Image.fromarray(frame), (x, bar))
            draw.text((x + 4, bar / 2), label, INK, _font(15), anchor="lm")
        frames.append(np.asarray(canvas))
    return np.stack(frames)


def difference(left: NDArray, right: NDArray, gain: int = 4) -> NDArray:
    """How far two clips ``[F, H, W, 3]`` uint8 are apart: black where they agree, ``gain`` times the difference."""
    return (gain * abs(left.astype(int) - right.astype(int))).clip(0, 255).astype(np.uint8)


def step_chart(dense: Sequence[float], sparse: Sequence[float], name: str) -> Image.Image:
    """Seconds of attention in every denoising step as pairs of bars, dense and sparse."""
    width, height, left, top, bottom = 640, 320, 64, 64, 250
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 12), "seconds of attention, step by step", INK, _font(16))
    for place, (label, colour) in enumerate((("dense", LIGHT), (name, KEPT))):
        x = left + 120 * place
        draw.rectangle((x, 42, x + 10, 52), fill=colour)
        draw.text((x + 16, 47), label, INK, _font(13), anchor="lm")
    most = max(*dense, *sparse, 1e-9)
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        draw.line((left, y, width - MARGIN, y), fill=DROPPED)
        draw.text((left - 8, y), f"{share * most:.3g}", INK, _font(12), anchor="rm")
    pitch = (width - MARGIN - left) / len(dense)
    for step, pair in enumerate(zip(dense, sparse, strict=True)):
        for place, (seconds, colour) in enumerate(zip(pair, (LIGHT, KEPT), strict=True)):
            x = left + pitch * (step + 0.12 + 0.38 * place)
            draw.rectangle((x, bottom - seconds / most * (bottom - top), x + 0.36 * pitch, bottom), fill=colour)
        if pitch > 20 or step % 5 == 0:
            draw.text((left + pitch * (step + 0.5), bottom + 14), str(step + 1), INK, _font(12), anchor="mm")
    draw.text(((left + width) / 2, bottom + 40), "denoising step", INK, _font(13), anchor="mm")
    return picture


def terminal_map(plan: Plan, columns: int = 64) -> str:
    """The block map of the first head in characters: the darker, the more is kept."""
    shades = " .:-=+*#%@"
    keep = plan.block_mask()[0, 0].float()[None, None]
    size = min(columns, keep.shape[-2])
    shrunk = torch.nn.functional.adaptive_avg_pool2d(keep, (max(1, size // 2), size))[0, 0]
    level = (shrunk * (len(shades) - 1)).ceil().long()
    return "\n".join("".join(shades[i] for i in row) for row in level.tolist())


def _seen_from_the_middle(plan: Plan, grid: Grid) -> NDArray:
    """Per video token, ``[F, H, W]``: 1 where the middle query sees it, 2 at the query itself."""
    query = grid.before + grid.frames // 2 * grid.frame + grid.height // 2 * grid.width + grid.width // 2
    seen = plan.block_mask()[0, 0, plan.query_group[0, 0, query]][plan.key_group[0, 0]].float()
    seen[query] = 2
    return seen[grid.before : grid.before + grid.video].view(grid.frames, grid.height, grid.width).numpy()


def _montage(seen: NDArray, grid: Grid, side: int) -> Image.Image:
    columns = int(np.ceil(np.sqrt(grid.frames)))
    cell = side // columns
    sheet = Image.new("RGB", (columns * cell, side), PAPER)
    for frame, tokens in enumerate(seen):
        colours = np.select([tokens[..., None] == 2, tokens[..., None] == 1], [QUERY, KEPT], DROPPED).astype(np.uint8)
        scale = (cell - 6) / max(tokens.shape)
        size = [max(1, round(scale * n)) for n in (tokens.shape[1], tokens.shape[0])]
        tile = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
        sheet.paste(tile, (frame % columns * cell, frame // columns * cell))
    return sheet


def _shade(values: NDArray) -> NDArray:
    """Values in 0..1 from paper to ink, ``[..., 3]`` uint8."""
    return (np.array(DROPPED) + values[..., None] * (np.array(KEPT) - np.array(DROPPED))).round().astype(np.uint8)


def _blend(value: float) -> tuple[int, ...]:
    return tuple(int(x) for x in _shade(np.array(min(max(value, 0.0), 1.0))))


def _enlarged(colours: NDArray, width: int, height: int) -> Image.Image:
    sampling = Image.Resampling.NEAREST if colours.shape[0] <= height else Image.Resampling.BOX
    return Image.fromarray(colours).resize((width, height), sampling)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
