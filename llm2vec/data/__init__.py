"""Training rows: where they are from, their order, and how they become batches."""
