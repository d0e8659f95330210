"""Helpers that both packages share: errors, progress, files and numbers."""
