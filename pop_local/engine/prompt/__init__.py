"""Prompts from conversations: chat templates, special tokens and pictures."""
