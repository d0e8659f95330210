"""Conversion: choose a boundary, fit the projections, measure and write."""
