"""Many texts: encoded in parts, searched in blocks."""
