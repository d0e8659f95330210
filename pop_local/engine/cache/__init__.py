"""The KV cache: rows, keys, saved states, and the prompt cache."""
