"""Dense and sparse video from one seed, for the ``demo`` command and the Gradio page."""
