"""Helpers shared by both packages: errors, progress, files, and numbers."""
