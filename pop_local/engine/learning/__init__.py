"""Online calibration: sums for fitting projections, collected from the user's prompts."""
