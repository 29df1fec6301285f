"""Training of `shapes-wan`; the command is `python -m dit_sparse.bundled.shapes_wan.train`."""
