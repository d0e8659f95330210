"""Analyses and training, which commands import on demand, since some modules need torch."""
