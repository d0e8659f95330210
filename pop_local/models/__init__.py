"""Models' files and names."""
