"""Fit a plan's K/V projections on a text: choose windows, read them, and store the progress."""
