"""Online calibration: collect sums for fitting projections from the user's prompts."""
