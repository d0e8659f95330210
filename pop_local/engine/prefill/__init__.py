"""Plan which rows of a prompt are full or pruned, and read prompts into a KV cache."""
