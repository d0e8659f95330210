"""Build llama-cpp-python with pop-local's hooks: fetch, extract, patch, compile."""
