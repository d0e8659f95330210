"""The APIs of other programs; each file translates one to the requests of `request_bodies`."""
