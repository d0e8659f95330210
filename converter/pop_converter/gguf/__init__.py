"""GGUF files: headers, sources, content."""
