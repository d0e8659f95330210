"""The APIs that others' programs speak: each file translates one to the server's own requests."""
