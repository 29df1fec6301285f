"""The autoencoder: an `AutoencoderKLWan` with analytic weights that is the identity on patches.

With ``patch_size=2``, `AutoencoderKLWan` rearranges 2x2 pixels of 3 colours into 12 channels (patchify) and back. The
network in between has to be the identity. Its residual branches are set to zero, which leaves convolution, RMS norm,
SiLU and convolution. A constant channel much larger than the pixels makes the norm a constant factor; pixels scaled
far below 1 stay in the linear range of SiLU, where its slope is 1/2.
"""

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

LATENT_PATCH = 2  # pixels along each side of one place of the latents; the transformer joins 2x2 places to a token
CHANNELS = 3 * LATENT_PATCH**2  # latent channels
HIDDEN_CHANNELS = CHANNELS + 1  # the last one is constant
CONSTANT = 1024.0  # value of the constant channel
PIXEL_SCALE = 2.0**-11  # scale of the pixels inside SiLU
LOG_VARIANCE = -30.0


def build_autoencoder(mean: list[float], std: list[float]) -> AutoencoderKLWan:
    """Return the identity autoencoder.

    Args:
        mean: mean of each of the 12 latent channels, stored in the config for the pipeline.
        std: standard deviation of each latent channel, stored in the config, too.
    """
    autoencoder = AutoencoderKLWan(
        base_dim=HIDDEN_CHANNELS,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        latents_mean=mean,
        latents_std=std,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=LATENT_PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=LATENT_PATCH,
    )
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            parameter.fill_(1.0 if name.endswith("gamma") else 0.0)
        for network in (autoencoder.encoder, autoencoder.decoder):
            _set_identity(network)
        for pointwise in (autoencoder.quant_conv, autoencoder.post_quant_conv):
            _set_identity_kernel(pointwise, 1.0)
        autoencoder.quant_conv.bias[CHANNELS:] = LOG_VARIANCE
    return autoencoder.eval().requires_grad_(False)


def _set_identity(network: torch.nn.Module) -> None:
    """Set the weights of an encoder or decoder so that it returns its input."""
    _set_identity_kernel(network.conv_in, 1.0)
    network.conv_in.bias[CHANNELS] = CONSTANT
    network.norm_out.gamma.fill_(PIXEL_SCALE * CONSTANT / HIDDEN_CHANNELS**0.5)
    _set_identity_kernel(network.conv_out, 2.0 / PIXEL_SCALE)


def _set_identity_kernel(convolution: torch.nn.Module, factor: float) -> None:
    """Set a kernel to ``factor`` times the identity: the middle tap in space, the last in time (it is causal)."""
    height, width = convolution.kernel_size[1:]
    for channel in range(CHANNELS):
        convolution.weight[channel, channel, -1, height // 2, width // 2] = factor


def patchify(video: Tensor) -> Tensor:
    """Return the latents of a video as the autoencoder computes them.

    Args:
        video: pixels ``[3, frames, height, width]``.

    Returns:
        ``[12, frames, height / 2, width / 2]``.
    """
    _, frames, height, width = video.shape
    rows, columns = height // LATENT_PATCH, width // LATENT_PATCH
    patches = video.view(3, frames, rows, LATENT_PATCH, columns, LATENT_PATCH)
    return patches.permute(0, 5, 3, 1, 2, 4).reshape(CHANNELS, frames, rows, columns)
