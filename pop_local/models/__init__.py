"""Model files and model names."""
