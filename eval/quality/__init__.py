"""Quality measures: fidelity to the dense video, and VBench-style scores of a single video."""
