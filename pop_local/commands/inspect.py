"""`pop-local inspect FILE`: show the contents of a model file."""

from typing import Annotated

import typer

from pop_local.commands.shared_options import Json, Sidecar
from pop_local.ui.tables import print_facts, print_json, print_sentence
from pop_local.ui.views.inspect import inspection_facts, summary_facts
from pop_local.workflows import inspect as workflow


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="FILE", help="A GGUF file, or the name of a catalog model.")
    ],
    sidecar: Sidecar = None,
    json: Json = False,
) -> None:
    """Show a model's architecture, layers, boundary, sizes, and origin."""
    inspection = workflow.inspect(model, sidecar)
    if json:
        print_json(inspection)
        return
    print_facts(summary_facts(inspection))
    print_sentence("")
    print_facts(inspection_facts(inspection))
