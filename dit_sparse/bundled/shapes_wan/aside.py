"""Two heads of the later blocks look aside in time: one at the frames ahead, one at the frames before.

Attention that begins by likeness treats past and future alike, and left and right. What moves right and what moves
left are then one and the same, and to tell them apart attention would have to become one-sided in time and in space
at once: neither half is worth anything alone. From the prompt the model learnt within minutes along which axis things
move, and after hours not yet which way. These heads give one half. By themselves they brought nothing in a quarter of
an hour; with prompts to tell apart (`prompts.mistold`) the way was learnt, and whether it needs both is not known.
"""

import torch

HEADS = {0: 1.5, 1: -1.5}  # how many frames ahead of its query a head's favourite key is
AXES = ((0, 24), (24, 20), (44, 20))  # rotary channels of time, height and width of a head: the first, how many
PAIRS = (0, 1)  # the fastest turning ones
STRENGTH = 3.0  # in units of the other entries of queries and keys


class Aside:
    """Holds constant parts of queries and keys, in proportion to the rest, which grows as training goes on.

    They are entries of the biases, so the trained model needs nothing of this.
    """

    def __init__(self, transformer, first_block=2):
        self.projections = []
        for block in transformer.blocks[first_block:]:
            self.projections += [(block.attn1.to_q, HEADS), (block.attn1.to_k, dict.fromkeys(HEADS, 0.0))]
        self.measured = {projection: [] for projection, _ in self.projections}
        for projection, _ in self.projections:
            projection.register_forward_hook(self._measure)

    def _measure(self, projection, _, output):
        self.measured[projection].append(output.detach().square().mean().sqrt())

    @torch.no_grad()
    def hold(self):
        """Set the biases by what the forward passes since the last time gave, in whatever order they ended."""
        for projection, heads in self.projections:
            size = STRENGTH * max(self.measured[projection])
            self.measured[projection].clear()
            for head, frames in heads.items():
                for (first, channels), ahead in zip(AXES, (frames, 0.0, 0.0), strict=True):
                    for pair in PAIRS:
                        angle = torch.tensor(ahead * 10_000 ** (-2 * pair / channels))
                        here = 64 * head + first + 2 * pair
                        turned = torch.stack([angle.cos(), angle.sin()]).to(projection.bias.device)
                        projection.bias[here : here + 2] = size * turned
