"""Conversion: choose a boundary, fit the projections, measure the loss, and write the file."""
