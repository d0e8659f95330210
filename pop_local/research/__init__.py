"""Analyses and trainings that need torch."""
