"""Builds llama-cpp-python with the hooks of pop-local: fetch, extract, patch, hand over."""
