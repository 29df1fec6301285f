"""Head profiles: the JSON schema, the search for one, and its measurement on a pipeline."""
