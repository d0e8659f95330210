"""The engine contains all code that calls llama_cpp, and no user interface."""
