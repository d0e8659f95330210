"""Text out of users' files."""
