"""A Wan autoencoder that was computed, not trained: it only moves pixels into channels and back.

`AutoencoderKLWan` with `patch_size=4` folds 4x4 pixels of 3 colours into 48 channels. Between folding and unfolding
stands a network that has to become the identity. Its residual branches are set to zero; what remains is
convolution, RMS norm, SiLU, convolution. A constant channel much larger than the pixels makes the norm a
constant factor, and signals much smaller than one see only the slope of SiLU at zero, which is one half.
"""

import torch
from diffusers import AutoencoderKLWan

from .scenes import CELL

CHANNELS = 3 * CELL * CELL
WIDTH = CHANNELS + 1
CONSTANT = 1024.0  # value of the constant channel
SMALL = 2.0**-11  # scale of the pixels inside SiLU
LOG_VARIANCE = -30.0


def build_autoencoder(mean, std):
    """The identity autoencoder; `mean` and `std` of the 48 latent channels are stored for the pipeline."""
    autoencoder = AutoencoderKLWan(
        base_dim=WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        latents_mean=mean,
        latents_std=std,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=CELL,
        scale_factor_temporal=1,
        scale_factor_spatial=CELL,
    )
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            parameter.fill_(1.0 if name.endswith("gamma") else 0.0)
        for half in (autoencoder.encoder, autoencoder.decoder):
            _pass_through(half)
        for pointwise in (autoencoder.quant_conv, autoencoder.post_quant_conv):
            _copy_channels(pointwise, 1.0)
        autoencoder.quant_conv.bias[CHANNELS:] = LOG_VARIANCE
    return autoencoder.eval().requires_grad_(False)


def _pass_through(half):
    _copy_channels(half.conv_in, 1.0)
    half.conv_in.bias[CHANNELS] = CONSTANT
    half.norm_out.gamma.fill_(SMALL * CONSTANT / WIDTH**0.5)
    _copy_channels(half.conv_out, 2.0 / SMALL)


def _copy_channels(convolution, factor):
    """Tap the voxel itself: the middle in space, the newest in time, because the convolution is causal."""
    height, width = convolution.kernel_size[1:]
    for channel in range(CHANNELS):
        convolution.weight[channel, channel, -1, height // 2, width // 2] = factor


def fold(video):
    """Pixels (3, frames, height, width) to latents (48, frames, height / 4, width / 4), as the autoencoder does."""
    _, frames, height, width = video.shape
    cells = video.view(3, frames, height // CELL, CELL, width // CELL, CELL)
    return cells.permute(0, 5, 3, 1, 2, 4).reshape(CHANNELS, frames, height // CELL, width // CELL)
