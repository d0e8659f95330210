"""Read a model's layer sizes and find the layers that prompt tokens can skip."""
