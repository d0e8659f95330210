"""Documents: users' files as text, and synthetic ones."""
