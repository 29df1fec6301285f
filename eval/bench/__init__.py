"""Benchmarks of attention, whole transformers and scaling, and reports on the compiled kernels."""
