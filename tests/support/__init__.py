"""Test helpers: models, jobs, servers, terminals. Import as `from support.raw import run`."""
