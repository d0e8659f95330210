"""Read text from users' files, and generate documents for look-ups."""
