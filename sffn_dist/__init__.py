"""Pre-training of language models with structured feed-forward layers."""

__version__ = "0.1.0"
