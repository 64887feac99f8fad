"""Texts, templates and tokens. Knows no model."""
