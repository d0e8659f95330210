"""Download llama-cpp-python, apply pop-local's patches, and compile it."""
