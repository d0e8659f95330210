"""Conversion: choose a boundary, fit the projections, measure the loss, write the file."""
