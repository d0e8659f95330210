"""Fits of a plan's K/V projections: texts, windows, the pass over them, sums on disk."""
