"""Generation of videos: load a pipeline, generate one clip, or a batch from a prompt file."""
