"""Under every room: errors, progress, files, numbers."""
