"""The commands' results as tables, texts and JSON."""
