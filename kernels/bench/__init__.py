"""What tools/bench.py starts. A package by this file alone, so that kernels/ on the path gives it, and not tools/bench.py."""
