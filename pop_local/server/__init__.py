"""The HTTP server, which serves the same models through multiple APIs."""
