"""Kernels that plan: attention mass of blocks, k-means, top-k selection."""
