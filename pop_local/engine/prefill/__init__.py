"""Which rows of a prompt run in full, and what is known of those in the KV cache."""
