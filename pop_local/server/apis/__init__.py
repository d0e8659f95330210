"""The HTTP APIs. Each module converts its requests to the classes in `request_bodies`."""
