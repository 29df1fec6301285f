"""Gates: scorers with trained parameters, and the files that hold them."""
