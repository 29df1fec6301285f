"""The demo as a page: ``python app.py`` after ``pip install -e '.[demo]'``. Bound to localhost."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gradio as gr

from dit_sparse import METHODS, SparseAttnProcessor
from dit_sparse.eval.demo import Demo
from dit_sparse.eval.generate import BUNDLED_CALL, BUNDLED_PROMPT

STEPS = BUNDLED_CALL["num_inference_steps"]


def compare(
    prompt: str, method: str, density: float, dense_steps: float, steps: float, seed: float, progress=gr.Progress()
):
    """Both videos, the pictures and the numbers of one comparison; wrong input becomes a message on the page."""
    out = Path(tempfile.mkdtemp(prefix="dit-sparse-"))

    def stage(name: str):
        return lambda done, total: progress((done, total), desc=name, unit="steps")

    try:
        processor = SparseAttnProcessor(method, density=density, dense_steps=float(dense_steps))
        call = {"num_inference_steps": int(steps)}
        result = Demo(prompt[:500] or BUNDLED_PROMPT, processor, out, int(seed), call).run(stage)
    except ValueError as error:
        raise gr.Error(str(error)) from None
    picture = lambda name: str(out / name) if (out / name).exists() else None
    numbers = {
        key: result[key] for key in ("speedup", "attention_speedup", "psnr", "ssim", "density_achieved", "density_run")
    }
    return (
        str(out / "side-by-side.mp4"),
        picture("mask.png"),
        picture("retained.png"),
        numbers,
        str(out / "result.json"),
    )


with gr.Blocks(title="dit-sparse") as page:
    gr.Markdown("# dit-sparse\nOne prompt, one seed, drawn twice: with dense attention, and with most of it left out.")
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(BUNDLED_PROMPT, label="Prompt", max_length=500)
            method = gr.Dropdown(list(METHODS), value="radial", label="Method")
            density = gr.Slider(0.05, 1.0, 0.25, step=0.05, label="Density: fraction of the pairs computed")
            dense_steps = gr.Slider(0.0, 1.0, 0.25, step=0.05, label="First steps kept dense, as a fraction")
            steps = gr.Slider(4, 30, STEPS, step=1, label="Denoising steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            start = gr.Button("Draw both", variant="primary")
        with gr.Column(scale=2):
            video = gr.Video(label="Dense and sparse", autoplay=True, loop=True)
            numbers = gr.JSON(label="Measured")
            result = gr.File(label="result.json")
    with gr.Row():
        mask, retained = gr.Image(label="Mask"), gr.Image(label="Attention retained")
    start.click(
        compare,
        [prompt, method, density, dense_steps, steps, seed],
        [video, mask, retained, numbers, result],
        concurrency_limit=1,
    )

if __name__ == "__main__":
    page.launch(server_name="127.0.0.1")
