"""Texts of users' files, and synthetic documents for look-ups."""
