"""Training: engine, loop, phases, guards."""
