"""Learning while reading: the sums that a fit of projections needs, kept of what is read."""
