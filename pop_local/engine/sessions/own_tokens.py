"""Whose the KV cache is: a model has one, and saves it only for the conversation it belongs to."""

from dataclasses import replace

from converter.errors import PopError
from pop_local.engine.chat_model import ChatModel
from pop_local.engine.decode.text import Pieces
from pop_local.engine.sessions.conversation import Conversation


def n_own_tokens(model: ChatModel, conversation: Conversation) -> int:
    """How many cached tokens, from the first on, are the conversation's.

    They are the prompt of its last question, whole, and what is cached of the answer; otherwise 0.
    The answer is compared as text: as a message its tokens may be others than were sampled.
    """
    if not conversation.turns:
        return 0
    last = conversation.turns[-1]
    asked = conversation.without_last().plus(replace(last, answer=""))
    try:
        prompt = model.chat_prompt(asked.messages)
    except PopError:  # of another model's template, so nothing of it is cached
        return 0
    n_own = len(prompt.tokens)
    if model.n_cached(prompt.tokens) < n_own:
        return 0
    pieces = Pieces(model.vocab)
    said = last.answer.removeprefix(prompt.begun).encode()
    at = 0
    for token in model.input_ids[n_own : model.n_tokens].tolist():
        piece = pieces[token]
        if not said.startswith(piece, at):
            break
        at += len(piece)
        n_own += 1
    return n_own
