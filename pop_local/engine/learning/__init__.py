"""What a fit of projections needs, kept of all that is read in full."""
