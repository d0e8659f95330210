"""Find, name, and download model files, sidecars, and mmproj files."""
