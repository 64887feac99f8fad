"""The decoder: loading, attention, packing, pooling and checkpoints."""
