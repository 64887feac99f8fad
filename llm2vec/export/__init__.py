"""A checkpoint in the formats other libraries read."""
