"""What tests share: models, jobs, servers, terminals. Imported as `from support.raw import run`."""
