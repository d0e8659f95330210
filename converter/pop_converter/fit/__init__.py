"""Fit K/V projections and encode them as tensors."""
