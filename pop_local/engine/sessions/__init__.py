"""Conversations: what was said, held with a model, and kept in a file with its KV cache."""
