"""Convert GGUF models for prefill-only pruning: file format, plans, fits, and writers."""

__version__ = "0.1.0"
