"""Measurements of speed and memory, and a test bench of faults. Not part of the package."""
