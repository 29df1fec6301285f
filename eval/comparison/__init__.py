"""Comparison of methods on a model: generation of clips, summary of rows, reproduction of published results."""
