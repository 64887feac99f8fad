"""MTEB: the only wing that knows mteb."""
