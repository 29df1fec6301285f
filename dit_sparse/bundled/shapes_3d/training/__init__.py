"""Training of `shapes-3d`; the command is `python -m dit_sparse.bundled.shapes_3d.train`."""
