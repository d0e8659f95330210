"""Analysis and training modules, imported on demand because some need torch."""
