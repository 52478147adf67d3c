"""Linear probes: what an activation says, and how far to believe it."""
