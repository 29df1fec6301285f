"""How attention calls and forward calls of a diffusers model reach the run, and how the model is restored."""
