"""Head profiles: their file format, the search for one, and measurements on a pipeline."""
