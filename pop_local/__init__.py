"""Prefill-only pruning for GGUF models on the user's own machine."""

__version__ = "0.1.0"
