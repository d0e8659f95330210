"""The engine: all code that calls llama_cpp. The engine has no user interface."""
