"""What the quickstart, `embedder` and `adapt` make models of, and a contest of recipes on it."""
