"""The engine: all code that calls llama_cpp, without any user interface."""
