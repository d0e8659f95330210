"""Find model files, sidecars, and mmproj files by name or path."""
