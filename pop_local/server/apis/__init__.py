"""The APIs of other programs. Each module translates an API's requests to `request_bodies`."""
