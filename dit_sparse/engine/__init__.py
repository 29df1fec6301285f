"""Make a diffusers pipeline sparse and restore it: the only package that touches diffusers objects."""
