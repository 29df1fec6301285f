"""Static figures, drawn by matplotlib."""
