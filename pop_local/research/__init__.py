"""Analyses and training, some of which need torch; commands import them on demand."""
