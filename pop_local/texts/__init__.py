"""Text out of the files that people have."""
