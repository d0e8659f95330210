"""Library functions that implement the commands."""
