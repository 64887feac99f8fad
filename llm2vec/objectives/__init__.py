"""What is trained: one file an idea."""
