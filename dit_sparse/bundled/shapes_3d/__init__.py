"""Recipe of `shapes-3d`, a small model of coloured solids on sparse voxels.

`shapes-3d` generates the fine surface of a coarse solid, as the refining stages of TRELLIS.2 and UltraShape do. The
coarse solid is made from the prompt by a program. The weights are in `eval/models/shapes-3d`.

Data (`prompts`, `solids`, `surface`)
    `prompts` is the grammar, such as "a striped red torus on a blue box"; an eighth of the scenes is held out from
    training. `solids` makes the coarse solid and its surface cells, in a grid of up to 96 cells along each side.
    `surface` gives each of the 2x2x2 sub-voxels of a cell a signed distance and a colour: 32 channels. Relief and grain
    are random, but the same in all mirror images: the model has to match them by attention.

Model (`model`, `sparse_tensor`)
    `SLatFlowModel` has the structure, the names and the calls of attention of the flow models of TRELLIS, so that the
    adapter of TRELLIS makes it sparse: `dit_sparse.enable(pipeline)`. `pipeline` is `Shapes3DPipeline`.

Meshes (`meshes`)
    Marching cubes and files, pictures, and distances between meshes.

Training (`train` is the command, `training/` holds its parts)
    Rectified flow on solids made on the fly, small ones first.

Judge (`judge`)
    Generates held-out prompts and checks colours, patterns, relief, mirror images and the mesh, without a trained
    network. `concentration` measures how concentrated attention is, and how much the choice of blocks matters.

Card (`card`)
    Writes the model card, the `README.md` of the model folder, from the reports of training, concentration and judge.

From training to card::

    python -m dit_sparse.bundled.shapes_3d.train --minutes 150 --out OUT
    cd OUT/shapes-3d
    python -m dit_sparse.bundled.shapes_3d.concentration . --out reports/concentration.json
    python -m dit_sparse.bundled.shapes_3d.judge . --out reports/judge.json
    python -m dit_sparse.bundled.shapes_3d.card .
"""
