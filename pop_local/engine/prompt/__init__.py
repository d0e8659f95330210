"""Build prompts from conversations: chat templates, special tokens, and images."""
