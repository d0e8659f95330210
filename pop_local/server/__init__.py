"""The HTTP server, which serves models over multiple APIs."""
