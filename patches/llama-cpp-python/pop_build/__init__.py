"""Build llama-cpp-python with pop-local's patches: fetch, extract, patch, and compile it."""
