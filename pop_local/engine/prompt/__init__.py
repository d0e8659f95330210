"""From a conversation to a prompt: templates, special tokens, places of pictures."""
