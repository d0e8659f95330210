"""Notes about the model of a dialogue."""

from pop_local.engine.llama.backend import Mode
from pop_local.engine.model import PopModel
from pop_local.ui.chat.dialogue import Dialogue


def pruning_state(model: PopModel) -> str:
    """Return a sentence on whether prompt tokens skip layers."""
    pruning = model.engine.pruning
    is_off = pruning.mode is Mode.OFF
    if pruning.exact and is_off:
        return "Exact skipping is off: prompt tokens run all layers, with the same result."
    if pruning.exact:
        return (
            f"Exact skipping is on: prompt tokens skip layers {pruning.exact} and up. Answers equal"
            " the full model's."
        )
    if not pruning.boundary:
        return "Fast reading is not available: this model is not converted."
    if is_off:
        return "Fast reading is off: prompt tokens run all layers (/full off enables it)."
    n_layer = model.engine.context.shape.n_layer
    return (
        f"Fast reading is on: prompt tokens skip the last {n_layer - pruning.boundary} of {n_layer}"
        " layers (/full on disables it)."
    )


def warn_of_base_model(chat: Dialogue) -> None:
    if not chat.model.engine.prompter.has_template:
        chat.screen.warn(
            "This base model has no chat template: it continues text instead of answering."
        )


def warn_of_hidden_pictures(chat: Dialogue) -> None:
    if chat.session.conversation.pictures and not chat.model.engine.prompter.can_see:
        chat.screen.warn(
            "This model has no mmproj and cannot read the conversation's pictures. /undo and /clear"
            " remove them."
        )
