"""Analyses and training, imported on demand because some modules need torch."""
