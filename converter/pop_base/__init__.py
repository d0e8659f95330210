"""Helpers of the converter and the application: errors, progress, files, and numbers."""
