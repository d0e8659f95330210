"""The base of both packages: errors, progress, files, numbers."""
