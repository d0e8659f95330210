"""The HTTP APIs. Each module converts its requests to the classes of `request_bodies`."""
