"""The HTTP APIs. Each module converts one API's requests to the classes in `request_bodies`."""
