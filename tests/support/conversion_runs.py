"""Run `convert` with a search on small models."""

from typer.testing import CliRunner, Result

from pop_local.cli import app

# With random weights, nearly any pruning has a large KL, and the model copies nothing.
LOOSE = ("--max-kl", 50, "--max-ppl-ratio", 1000, "--max-copy-ratio", 1000)
FEW = ("--tokens", 2048, "--threads", 1, "--gpu-layers", 0)


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])
