"""Variants of one config trained to the same FLOPs: planning, results, curves."""
