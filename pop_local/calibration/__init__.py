"""Fits the K/V projections of a plan: texts, windows, the pass over them, the sums on disk."""
