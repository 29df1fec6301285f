"""The input of an image-to-video step: the first frame without noise, all others at the noise level of the step."""

from torch import Tensor, lerp


def add_noise(latents: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return noisy latents and the timestep of each token, as `WanImageToVideoPipeline` computes with
    ``expand_timesteps``.

    Args:
        latents: normalised latents ``[B, 12, frames, 2 * rows, 2 * columns]``, two places a token along each side.
        noise: of the same shape.
        levels: noise levels in [0, 1], ``[B]``.

    Returns:
        The noisy latents, and the timesteps ``[B, frames * rows * columns]``, 0 for the tokens of the first frame.
    """
    noisy = lerp(latents, noise, levels.view(-1, 1, 1, 1, 1))
    noisy[:, :, 0] = latents[:, :, 0]
    frames, height, width = latents.shape[2:]
    timesteps = 1000 * levels[:, None, None].repeat(1, frames, height // 2 * (width // 2))
    timesteps[:, 0] = 0
    return noisy, timesteps.flatten(1)
