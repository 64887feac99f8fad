"""Commands over training data, before anything is trained on it."""
