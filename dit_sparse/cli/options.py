"""Options shared by several commands, and the parsers of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bundled import BUNDLED
from .shared import completion

MAX_PROMPTS = 60  # prompts of the bundled model

Model = Annotated[str, typer.Option(help=f"{BUNDLED}, a local diffusers folder, or a name on the Hugging Face hub.")]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        callback=lambda text: import_methods(text),
        autocompletion=completion.names(completion.methods),
        help="Method, with settings and compositions: radial, 'radial(sink=true)', 'radial|sink', 'cached(svg2)', "
        "profile:NAME, module:Class of your own, or a preset. See `dit-sparse methods`. Default: the preset balanced; "
        "with --density, routed.",
    ),
]
Methods = Annotated[
    str, typer.Option(help="Methods, separated by commas, such as 'radial(sink=true),svg,pooled(svg)'.")
]
Kinds = Annotated[
    str | None,
    typer.Option(
        "--kind",
        autocompletion=completion.names(completion.kinds),
        help="Kinds of methods, separated by commas, such as scorer,pattern. Default: every kind.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        autocompletion=completion.names(completion.presets),
        help="A preset instead of a method: quality, balanced or fast. See `dit-sparse presets`.",
    ),
]
HeadProfile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        autocompletion=completion.names(completion.profiles),
        help="A head profile instead of a method: a name in profiles/ or a file.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        "-d",
        help="Fraction of the query-key pairs to compute, in (0, 1]. Default: 0.25 if the method has no settings.",
    ),
]
Densities = Annotated[str, typer.Option("--density", "-d", help="Densities, separated by commas.")]
DENSE_STEPS_HELP = "First denoising steps that stay dense: a count or a fraction."
DenseSteps = Annotated[str, typer.Option(help=DENSE_STEPS_HELP)]
DenseStepsOrProfile = Annotated[
    str | None, typer.Option("--dense-steps", help=f"{DENSE_STEPS_HELP} Default: 0.25, or that of the profile.")
]
DensityRamp = Annotated[
    str | None,
    typer.Option(
        "--density-ramp",
        help="Factors of the density at the first and last sparse step, such as 1.3,0.6. Default: that of the method.",
    ),
]
Executor = Annotated[
    str,
    typer.Option(
        autocompletion=completion.names(completion.executors), help="auto, or an executor of `dit-sparse doctor`."
    ),
]
Block = Annotated[int | None, typer.Option(help="Tokens in a block. Default: 64 below 32,768 tokens, else 128.")]
Guard = Annotated[
    float | None,
    typer.Option(help="Attention mass that every layer must retain, such as 0.9; layers below it compute more pairs."),
]

Prompts = Annotated[str, typer.Option(help="Number of bundled prompts, or a .txt, .csv or .jsonl file of prompts.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Seeds = Annotated[int, typer.Option(min=1, help="Clips per prompt, each with its own seed.")]

Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: that of the pipeline.")]
Frames = Annotated[int | None, typer.Option(help="Frames of the video.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the video must not show.")]
Fps = Annotated[int | None, typer.Option(help="Frames per second of the file. Default: those of the model.")]

Dtype = Annotated[
    str | None,
    typer.Option(
        autocompletion=completion.names(completion.dtypes),
        help="float32, bfloat16 or float16 of the weights. Default: bfloat16 on a GPU, else float32.",
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        autocompletion=completion.names(completion.offloads),
        help="Keep on the GPU only one component at a time (model), or one layer (sequential, much slower).",
    ),
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode the video in tiles, which needs less memory.")]

Engine = Annotated[
    str,
    typer.Option(
        help="local: this process; ray: the workers of a Ray cluster, the running one or a new one on this machine."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes of --engine ray. Default: one for each GPU, or for each machine without GPUs."),
]

Measures = Annotated[
    str,
    typer.Option(
        help="Measures of fidelity to the dense video, separated by commas: psnr, ssim, ms_ssim, xpsnr, vmaf, lpips, "
        "st_lpips, cvvdp; or fast (without the last two, which take seconds per frame on a CPU), or all."
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
OutJson = Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")]


def import_methods(text: str | None) -> str | None:
    """Import the modules of methods that are written ``module:Class``, and return the text."""
    from .terminal import one_sentence

    if text is None or ":" not in text:
        return text
    with one_sentence():
        from dit_sparse.notation.external import import_modules

        return import_modules(text)


def method_text(method: str | None, preset: str | None = None, profile: str | None = None) -> str | None:
    """Return the text of a method that is given by one of three options, or None.

    Raises:
        ValueError: two of them are given, or there is no such preset.
    """
    from dit_sparse.notation.presets import PRESETS
    from dit_sparse.notation.settings import alternatives_to
    from dit_sparse.notation.syntax import ProfileName, write

    given = {"--method": method, "--preset": preset, "--profile": profile}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} exclude each other")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"there is no preset {preset[:60]!r}; {alternatives_to(preset, PRESETS)}")
    return write(ProfileName(profile)) if profile is not None else method or preset


def call_arguments(
    steps: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    min_steps: int = 1,
) -> dict:
    """Return the arguments of a pipeline call that are not None.

    Raises:
        ValueError: a number is out of range.
    """
    from dit_sparse.generation.checks import check_call

    arguments = {"num_inference_steps": steps, "num_frames": frames, "height": height, "width": width}
    arguments |= {"guidance_scale": guidance, "negative_prompt": negative_prompt}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    check_call(arguments, min_steps)
    return arguments


def count_or_fraction(text: str | None) -> int | float | None:
    """Return an int for text such as ``"3"``, a float for text such as ``"0.2"``. Raises ValueError for other text."""
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        given = repr(text[:60])
        raise ValueError(f"--dense-steps must be a count such as 3 or a fraction such as 0.2, got {given}") from None


def density_ramp(text: str | None) -> list[float] | None:
    """Return the factors of a ramp such as ``"1.3,0.6"``. Raises ValueError for other text."""
    return None if text is None else numbers(text, "--density-ramp")


def numbers(text: str, option: str = "--density") -> list[float]:
    """Return the numbers of a list such as ``"0.15,0.25"``. Raises ValueError for other text."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        message = f"{option} must be numbers separated by commas, such as 0.15,0.25, got {text[:60]!r}"
        raise ValueError(message) from None


def method_list(text: str) -> list[str]:
    """Return the methods of a list separated by commas; commas in parentheses belong to the settings."""
    from dit_sparse.notation.syntax import split_list

    return [import_methods(part) for part in split_list(text) if part]


def measure_list(text: str) -> tuple[str, ...]:
    """Return the measures of a list separated by commas; ``fast`` and ``all`` stand for several. Raises ValueError for
    an unknown name."""
    from dit_sparse.eval.quality.measures import FAST, select_measures

    names = [part.strip() for part in text.split(",") if part.strip()]
    return select_measures([each for name in names for each in (FAST if name == "fast" else (name,))])


def read_prompts(text: str) -> list[str]:
    """Return that number of bundled prompts, or the prompts of a file.

    Raises:
        ValueError: the text is neither a number nor a file, or the file sets more than prompts.
    """
    from dit_sparse.bundled import bundled_prompts
    from dit_sparse.generation.prompts import read_rows

    if text.isdecimal() and 1 <= int(text) <= MAX_PROMPTS:
        return bundled_prompts()[: int(text)]
    if not Path(text).suffix:
        raise ValueError(
            f"--prompts must be a number from 1 to {MAX_PROMPTS}, or a .txt, .csv or .jsonl file, got {text[:60]!r}"
        )
    rows = [row for _, row in read_rows(Path(text))]
    settings = set().union(*(row.model_dump(exclude_none=True) for row in rows)) - {"prompt", "id"}
    if settings:
        names = ", ".join(sorted(settings))
        raise ValueError(f"{text} sets {names}, which only `dit-sparse batch` reads: remove the columns")
    return [row.prompt for row in rows]
