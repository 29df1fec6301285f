"""Triton programs, launch settings for each GPU architecture, and launching."""
