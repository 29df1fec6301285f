"""Interception of the attention calls and forward calls of a diffusers model, and restoring the model."""
