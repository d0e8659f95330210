"""Conversations with a model, and session files with transcript and KV cache."""
