"""`convert` as the tests of its search call it, on small models."""

from typer.testing import CliRunner, Result

from pop_local.cli import app

# Random weights: nearly any pruning is a large KL, and nothing is copied.
LOOSE = ("--max-kl", 50, "--max-ppl-ratio", 1000, "--max-copy-ratio", 1000)
FEW = ("--tokens", 2048, "--threads", 1, "--gpu-layers", 0)


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])
