"""Plan which rows of a prompt to prune, and read prompts into a KV cache."""
