"""Runs as jobs of a cluster: batch scripts, sweeps, what follows when a job ends. Imports no torch."""
