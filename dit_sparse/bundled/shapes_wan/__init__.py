"""Recipe of `shapes-wan-i2v`, a small image-to-video model.

`shapes-wan-i2v` is a `WanImageToVideoPipeline` of 3.8 million parameters. Its first frame shows textured circles,
squares and triangles on stone, drawn by a program (`first_frame`); the model moves them as the prompt says. Its weights
are in `dit_sparse/assets`. An earlier version of this recipe, of commit ffa8b43, trained `shapes-wan`.

Data (`scenes`, `textures`, `prompts`)
    Clips are rendered on the fly. `scenes` draws one or two sprites, `textures` their surfaces and the background,
    `prompts` describes them in random wording. An eighth of the pairs of sprites is held out from training.

Model (`build`, `autoencoder`, `conditioning`)
    A UMT5 text encoder of 2 layers, a Wan transformer of 6 layers, and an analytic autoencoder that rearranges 2x2
    pixels into 12 channels. One token is 4x4 pixels of one frame. The first frame is part of the transformer's input,
    without noise and with timestep 0, as in Wan 2.2 5B. It gives the number and the places of all objects. Without it,
    all frames would have to agree on them by attention between frames of noise, which was not learned in clips both
    long and wide.

Training (`train` is the command, `training/` holds its parts)
    1. `text_pretraining` trains the text encoder to classify the attributes that each colour word refers to.
    2. `trainer` trains the transformer by rectified flow on `batches`. `frame_selection` trains on some frames of a
       clip at their places in time, at a fraction of the cost of the whole clip.
    Loss (`loss`): a squared error of the velocity at four scales, and a hinge loss that makes a mismatched prompt
    predict a clip worse than its own.
    Curriculum (`curriculum`): clip sizes, prompt padding and learning rate by the fraction of the budget used, and the
    distribution of noise levels.
    `bundled/training` holds the optimizers Muon and AdamW, `temporal_bias` the constant attention biases of two heads.

Judge (`judge`)
    Generates held-out prompts and checks colour, number, shape, direction and path of every sprite in every frame,
    without a trained network. `concentration` measures how concentrated the model's self-attention is.

Card (`card`)
    Writes the model card, the `README.md` of the model folder, from the reports of training, concentration and judge.

From training to card::

    python -m dit_sparse.bundled.shapes_wan.train --minutes 130 --out OUT
    cd OUT/shapes-wan-i2v
    python -m dit_sparse.bundled.shapes_wan.concentration . --out reports/concentration.json
    python -m dit_sparse.bundled.shapes_wan.judge . --out reports/accuracy.json
    python -m dit_sparse.bundled.shapes_wan.card .
"""
