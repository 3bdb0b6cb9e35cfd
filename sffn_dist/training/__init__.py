"""Training: engine, loop, its reports, resuming, guards."""
