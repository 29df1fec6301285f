"""Training of gates: examples captured from dense generations, and distillation of the attention mass into a gate."""
