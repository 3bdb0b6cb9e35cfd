"""Training: engine, loop, what is told of it, resuming, guards."""
