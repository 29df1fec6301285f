"""Train shapes-3d: `python -m dit_sparse.bundled.shapes_3d.train --minutes 150 --out DIR [--resume] [--device cuda]`.

Trains rectified flow. A batch depends only on the step number, and curriculum and learning rate only on the fraction of
the budget used, so a resumed run continues exactly. To stop early, create DIR/STOP or send SIGTERM; the run then saves
a checkpoint and exports the model to DIR/shapes-3d.
"""

import argparse
from pathlib import Path

import torch

from ..training.loop import CHECKPOINT, train
from ..training.schedule import Budget
from .training.trainer import Trainer

MODEL = "shapes-3d"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=150.0, help="length in minutes of processor time")
    parser.add_argument("--steps", type=int, help="length of the training in steps instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-3d"), help="folder of checkpoint and model")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    parser.add_argument("--start", type=Path, help="continue the training of an exported model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--export", nargs=2, type=Path, metavar=("CHECKPOINT", "FOLDER"), help="only export a model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scale = 1 if options.device == "cpu" else 8
    trainer = Trainer(Budget(options.minutes, options.steps), device=options.device, batch_scale=scale)
    if options.export:
        trainer.load(options.export[0])
        return trainer.export(options.export[1])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and (options.out / CHECKPOINT).exists():
        trainer.load(options.out / CHECKPOINT)
    elif options.start:
        trainer.load_weights(options.start)
    return train(trainer, options.out, MODEL)


if __name__ == "__main__":
    main()
