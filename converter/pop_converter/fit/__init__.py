"""The solve of K/V projections."""
