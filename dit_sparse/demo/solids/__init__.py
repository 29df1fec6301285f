"""The demo of `shapes-3d`: a dense and a sparse solid from one seed."""
