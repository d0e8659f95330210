"""`pop-local analyze MODEL`: measure the quality loss at each boundary."""

from pop_local.commands import shared_options as opt
from pop_local.commands.option_expansion import expand_options
from pop_local.ui.tables import print_json
from pop_local.ui.views.analyze import as_json, show
from pop_local.ui.watch import stoppable_watch


@expand_options
def analyze(
    model: opt.Model,
    *,
    json: opt.Json = False,
    processors: opt.HardwareOptions,
) -> None:
    """Measure the quality loss at each boundary to find out how many layers a model can skip."""
    from pop_local.research import analyze as workflow

    with stoppable_watch() as watch:
        analysis = workflow.analyze(model, hardware=processors.hardware, watch=watch)
    print_json(as_json(analysis)) if json else show(analysis)
