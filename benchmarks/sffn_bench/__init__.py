"""What tools/bench.py starts: timings of layers, saves and guards, and their plots."""
