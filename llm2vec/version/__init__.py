"""The version, where upstream has it."""

from llm2vec import __version__

__all__ = ["__version__"]
