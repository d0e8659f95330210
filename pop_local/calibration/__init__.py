"""Fit K/V projections on text: choose windows, read them, and solve for the projections."""
