"""A model's layers, and the layers that prompt tokens can skip."""
