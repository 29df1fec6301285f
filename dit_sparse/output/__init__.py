"""Write results: atomic files, videos, and the conditions of a measurement."""
