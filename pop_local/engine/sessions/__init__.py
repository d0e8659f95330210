"""Conversations with a model, and session files that store a transcript and a KV cache."""
