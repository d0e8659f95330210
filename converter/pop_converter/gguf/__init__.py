"""Read and write GGUF files, including headers and split models."""
