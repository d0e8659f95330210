"""Fits of K/V projections."""
