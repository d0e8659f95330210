"""The HTTP server: several APIs for the same models."""
