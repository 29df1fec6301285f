"""Triton kernels, their launch settings for each GPU architecture, and their launch arguments."""
