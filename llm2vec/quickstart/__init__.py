"""The text and the tiny model that the quickstart makes."""
