"""Which rows of the KV cache get depth, and when."""
