"""Bindings of the patched llama.cpp, free of decisions about pruning."""
