"""A training run: its config, stages, trainer and step."""
