"""Bindings for the patched llama.cpp."""
