"""Recipe of `shapes-wan`, the bundled text-to-video model.

`shapes-wan` is a `WanPipeline` of 4.7 million parameters that draws textured circles, squares and triangles moving over
a textured background. Its weights are in `dit_sparse/assets/shapes-wan`; this package trains and evaluates them.

Data (`scenes`, `prompts`)
    Clips are rendered on the fly. `scenes` draws one or two sprites with random texture, `prompts` describes them in
    random wording. An eighth of the pairs of sprites is held out from training.

Model (`build`, `autoencoder`)
    A UMT5 text encoder of 2 layers, a Wan transformer of 6 layers, and an analytic autoencoder that rearranges 4x4
    pixels into 48 channels. One token is 4x4 pixels of one frame.

Training (`train` is the command, `training/` holds its parts)
    1. `text_pretraining` trains the text encoder to classify the attributes that each colour word refers to.
    2. `trainer` trains the transformer by rectified flow on `batches`.
    Loss (`loss`): a squared error of the velocity at four scales, and a hinge loss that makes a mismatched prompt
    predict a clip worse than its own.
    Curriculum (`curriculum`): clip sizes, prompt padding and learning rate by the fraction of the budget used, and the
    distribution of noise levels.
    `optimizers` holds Muon and AdamW, `temporal_bias` the constant attention biases of two heads.

Judge (`judge`)
    Generates held-out prompts and checks colour, shape and direction of every sprite, without a trained network.
    `concentration` measures how concentrated the model's self-attention is.

Card (`card`)
    Writes the model card, the `README.md` of the model folder, from the reports of training, concentration and judge.

From training to card::

    python -m dit_sparse.bundled.shapes_wan.train --minutes 130 --out OUT
    python -m dit_sparse.bundled.shapes_wan.concentration OUT/shapes-wan --out OUT/shapes-wan/reports/concentration.json
    python -m dit_sparse.bundled.shapes_wan.judge OUT/shapes-wan --out OUT/shapes-wan/reports/accuracy.json
    python -m dit_sparse.bundled.shapes_wan.card OUT/shapes-wan
"""
