"""Are the ranks there, alike and right: pre-flight, heartbeat, watchdog, replica check, stragglers."""
