"""Bindings of the patched llama.cpp."""
