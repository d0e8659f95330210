"""From the user's prompts, collect the sums needed to fit projections (online calibration)."""
