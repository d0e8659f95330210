"""The engine: all code that calls llama_cpp, with no user interface."""
