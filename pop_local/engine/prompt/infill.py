"""Fill-in-the-middle (FIM) prompts for models trained to fill in code."""

from collections.abc import Sequence

from pop_base.errors import PopError
from pop_local.engine.llama.backend import bindings
from pop_local.engine.llama.context import Context

_SNIPPET = "\n\n--- snippet ---\n\n"


def can_infill(context: Context) -> bool:
    return min(_marks(context, "pre", "suf", "mid")) >= 0


def infilling(
    context: Context,
    prefix: str | Sequence[int],
    suffix: str,
    begun: str = "",
    files: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Return a FIM prompt's tokens in the order used by llama.cpp's server (format_prompt_infill).

    `prefix`: text or tokens. `begun`: the start of the answer. `files`: (name, text) pairs that
    precede the prefix. Special tokens in these strings are treated as plain text. Raises PopError.
    """
    if not can_infill(context):
        raise PopError(
            "this model has no fill-in-the-middle (FIM) tokens",
            "use a model trained for fill-in-the-middle completion",
        )
    pre, suf, mid, rep, sep = _marks(context, "pre", "suf", "mid", "rep", "sep")
    split = context.vocabulary.tokenize
    shown = [rep, *split("myproject\n")] if rep >= 0 and files else []
    for name, text in files:
        shown += [sep, *split(f"{name}\n")] if sep >= 0 else split(_SNIPPET)
        shown += split(text)
    if files and sep >= 0:
        shown += [sep, *split("filename\n")]
    before = split(prefix) if isinstance(prefix, str) else prefix
    return [*context.vocabulary.bos, *shown, pre, *before, *split(begun), suf, *split(suffix), mid]


def _marks(context: Context, *names: str) -> list[int]:
    """Return the IDs of the named FIM tokens, with -1 for each missing token."""
    api = bindings()
    return [
        int(getattr(api, f"llama_vocab_fim_{name}")(context.vocabulary.pointer)) for name in names
    ]
