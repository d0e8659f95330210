"""Build models that can fill in the middle between two texts."""

from pathlib import Path

from pop_local.engine.model import PopModel
from support.converted import tiny

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def make_filler(folder: Path) -> Path:
    return tiny(folder, n_vocab=512, control=list(FIM))


def by_hand(model: PopModel, before: str, after: str, begun: str = "") -> list[int]:
    """Return a prompt's tokens, assembled one by one."""
    pre, suf, mid = (model.engine.context.vocabulary.tokenize(mark, special=True) for mark in FIM)
    assert [len(mark) for mark in (pre, suf, mid)] == [1, 1, 1]
    begun_tokens = model.engine.context.vocabulary.tokenize(begun) if begun else []
    before_tokens, after_tokens = (
        model.engine.context.vocabulary.tokenize(before),
        model.engine.context.vocabulary.tokenize(after),
    )
    return [
        *model.engine.context.vocabulary.bos,
        *pre,
        *before_tokens,
        *begun_tokens,
        *suf,
        *after_tokens,
        *mid,
    ]
