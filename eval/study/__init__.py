"""Studies of methods on a model: the error of one denoising step, and what each part of a method contributes."""
