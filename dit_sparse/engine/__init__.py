"""Makes a diffusers pipeline sparse and restores it: the only package that touches diffusers objects."""
