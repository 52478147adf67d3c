"""The numbers that the project stands behind, as ratios measured side by side in one process."""
