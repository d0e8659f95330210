"""Conversations with a model, and session files with a transcript and a KV cache."""
