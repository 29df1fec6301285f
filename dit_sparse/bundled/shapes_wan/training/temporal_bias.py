"""Temporal attention biases: in the later blocks one head attends forward in time and one head backward.

Self-attention starts from similarity (`build.build_transformer`) and is therefore symmetric in time and space, so
motion to the left and motion to the right look the same. To distinguish them, attention has to become asymmetric in
time and in space at once; either asymmetry alone does not reduce the loss. Without these biases the model learned from
the prompt within minutes along which axis objects move, but not in which direction, even after hours. The biases
provide the asymmetry in time. Used alone they brought no improvement in 15 minutes of training; together with
mismatched prompts (`prompts.make_mismatched`) the model learned the direction. Whether both are needed is not known.
"""

import torch
from torch import Tensor

HEAD_DIM = 64
HEAD_OFFSETS = {0: 1.5, 1: -1.5}  # head: frames from a query to the keys that its bias favours
ROPE_AXES = ((0, 24), (24, 20), (44, 20))  # first channel and number of channels of time, height, width in a head
ROPE_PAIRS = (0, 1)  # channel pairs of each axis with the highest rotary frequency
STRENGTH = 3.0  # relative to the root mean square of the queries and keys


class TemporalBias:
    """Keeps constant components in the query and key biases of the later blocks.

    Their size follows the root mean square of the projections' outputs, which grows during training. The components
    are entries of the projections' bias parameters, so the exported model needs no extra code.

    Args:
        transformer: the transformer in training; forward hooks are registered on its projections.
        first_block: index of the first block with biases.
    """

    def __init__(self, transformer: torch.nn.Module, first_block: int = 2):
        self.projections = []
        for block in transformer.blocks[first_block:]:
            self.projections += [(block.attn1.to_q, HEAD_OFFSETS), (block.attn1.to_k, dict.fromkeys(HEAD_OFFSETS, 0.0))]
        self.output_rms = {projection: [] for projection, _ in self.projections}
        for projection, _ in self.projections:
            projection.register_forward_hook(self._record_rms)

    def _record_rms(self, projection: torch.nn.Module, _, output: Tensor) -> None:
        self.output_rms[projection].append(output.detach().square().mean().sqrt())

    @torch.no_grad()
    def apply(self) -> None:
        """Set the biases from the outputs since the last call.

        Uses the maximum over forward passes, which does not depend on the order in which threads finish.
        """
        for projection, offsets in self.projections:
            size = STRENGTH * max(self.output_rms[projection])
            self.output_rms[projection].clear()
            for head, frames in offsets.items():
                for (first, channels), offset in zip(ROPE_AXES, (frames, 0.0, 0.0), strict=True):
                    for pair in ROPE_PAIRS:
                        angle = torch.tensor(offset * 10_000 ** (-2 * pair / channels))
                        start = HEAD_DIM * head + first + 2 * pair
                        rotated = torch.stack([angle.cos(), angle.sin()]).to(projection.bias.device)
                        projection.bias[start : start + 2] = size * rotated
