"""Telemetry: the plan, metrics, progress, trackers, what a device can do."""
