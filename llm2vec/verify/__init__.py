"""Whether two ways of loading a model give the same vectors."""
