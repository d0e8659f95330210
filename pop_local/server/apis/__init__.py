"""The APIs of other programs.

Each module converts the requests of an API to the classes of `request_bodies`.
"""
