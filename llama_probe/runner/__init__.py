"""Running experiments, and showing what came out."""
