"""Kernels for planning: attention mass of blocks, k-means, top-k selection."""
