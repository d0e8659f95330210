"""Analysis and training modules, which are imported on demand because some require torch."""
