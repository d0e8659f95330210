"""Collect sums for fitting projections from the user's prompts (online calibration)."""
