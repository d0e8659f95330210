"""Shared by tests: models, jobs, servers, terminals. Imported as `from support.raw import run`."""
