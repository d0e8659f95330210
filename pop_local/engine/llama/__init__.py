"""The C boundary: the patched llama.cpp as Python sees it, and nothing that decides."""
