"""Static pictures, drawn by matplotlib."""
