"""Engine: everything that calls llama_cpp, without any user interface."""
