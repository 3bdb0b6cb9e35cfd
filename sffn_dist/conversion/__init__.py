"""Checkpoints from and to other formats, their inspection and comparison."""
