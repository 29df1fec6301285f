"""Benchmarks: attention, whole transformers, scaling, and what the compiler makes of the kernels."""
