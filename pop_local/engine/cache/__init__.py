"""The KV cache: its rows, whose they are, saved states and the cache of prompts."""
