"""Sparse masks compared with the best mask of the same density."""
