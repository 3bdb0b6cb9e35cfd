"""What tools/bench.py starts; run from kernels/, since no package of this project holds it."""
