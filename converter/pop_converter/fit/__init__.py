"""Fit K/V projections and encode the fits as tensors."""
