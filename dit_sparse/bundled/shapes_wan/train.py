"""Train shapes-wan-i2v: `python -m dit_sparse.bundled.shapes_wan.train --minutes 130 --out DIR [--resume]`.

Trains rectified flow, as `WanImageToVideoPipeline` expects. A batch depends only on the step number, and curriculum and
learning rate only on the fraction of the budget used, so a resumed run continues exactly. To stop early, create
DIR/STOP or send SIGTERM; the run then saves a checkpoint and exports the model.
"""

import argparse
from pathlib import Path

import torch

from .. import BUNDLED
from ..training.loop import CHECKPOINT, train
from ..training.schedule import Budget
from .training.curriculum import CONTINUATION, CURRICULUM
from .training.text_pretraining import pretrain_text_encoder
from .training.trainer import Trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=130.0, help="length of the training")
    parser.add_argument("--steps", type=int, help="length of the training in steps instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("shapes-out"), help="folder of checkpoint and exported model")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    parser.add_argument("--start", type=Path, help="continue the training of an exported model")
    parser.add_argument("--light", action="store_true", help="checkpoints below 16 MB, without optimizer state")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; each trains on a shard of the batch")
    parser.add_argument("--export", nargs=2, type=Path, metavar=("CHECKPOINT", "FOLDER"), help="only export a model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards, batch_scale = (options.threads, 1) if options.device == "cpu" else (1, 16)
    budget = Budget(options.minutes, options.steps)
    curriculum = CONTINUATION if options.start else CURRICULUM
    trainer = Trainer(budget, curriculum, device=options.device, shards=shards, batch_scale=batch_scale)
    if options.export:
        trainer.load(options.export[0])
        return trainer.export(options.export[1])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and (options.out / CHECKPOINT).exists():
        trainer.load(options.out / CHECKPOINT)
    elif options.start:
        trainer.load_weights(options.start)
    else:
        loss = pretrain_text_encoder(trainer.text_encoder, trainer.tokenizer)
        print(f"text encoder pretrained, loss {loss:.4f}", flush=True)
    return train(trainer, options.out, BUNDLED, light=options.light)


if __name__ == "__main__":
    main()
