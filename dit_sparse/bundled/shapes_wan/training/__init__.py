"""Training of `shapes-wan-i2v`; the command is `python -m dit_sparse.bundled.shapes_wan.train`."""
