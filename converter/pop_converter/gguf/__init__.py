"""GGUF files: headers, split models, and content to write."""
