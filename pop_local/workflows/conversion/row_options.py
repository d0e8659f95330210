"""Options for the rows that run in full."""

from dataclasses import dataclass

from pop_converter.popfile.format import DeepRows, PopMeta
from pop_converter.popfile.pruning_plan import TAIL_TOKENS


@dataclass(frozen=True)
class RowOptions:
    """Numbers and kinds of prompt tokens that run all layers.

    `deep_rows`: words whose tokens run all layers. `min_prompt`: shortest pruned prompt in tokens
    (default: the length from which pruning saves enough).
    """

    sink_tokens: int = PopMeta.sink_tokens
    tail_tokens: int = TAIL_TOKENS
    min_prompt: int | None = None
    deep_rows: DeepRows = DeepRows.NAMES
