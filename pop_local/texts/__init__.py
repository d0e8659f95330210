"""Read texts from users' files and generate documents for look-ups."""
