"""A model's files, and the names that it goes by."""
