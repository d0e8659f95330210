"""The HTTP server, which provides multiple APIs for the same models."""
