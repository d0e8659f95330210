"""Online calibration: collect sums while prompts are read, and use them to fit projections."""
