"""Telemetry: FLOPs and MFU, metrics, progress, trackers, plan, report."""
