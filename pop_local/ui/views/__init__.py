"""The commands' results as tables, text, and JSON."""
