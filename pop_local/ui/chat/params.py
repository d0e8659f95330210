"""/set: how answers are sampled, and how long they may be."""

import math
from dataclasses import dataclass

from pop_local.config.nearest import nearest_hint
from pop_local.engine.turn import TurnOptions
from pop_local.ui.chat.dialogue import Dialogue


@dataclass(frozen=True)
class Param:
    """A field of TurnOptions that may be set, from `least` to `most`."""

    kind: type[int] | type[float]
    least: float = 0
    most: float = math.inf

    def parse(self, text: str) -> float | None:
        """None for what it cannot be."""
        try:
            value = self.kind(text)
        except ValueError:
            return None
        return value if self.least <= value <= self.most and math.isfinite(value) else None

    def __str__(self) -> str:
        kind = "a whole number" if self.kind is int else "a number"
        return kind + f" from {self.least:g}" + (f" to {self.most:g}" if self.most < 1e9 else "")


PARAMS = {
    "temperature": Param(float),
    "top_k": Param(int),
    "top_p": Param(float, most=1),
    "min_p": Param(float, most=1),
    "repeat_penalty": Param(float, least=0.1),
    "max_tokens": Param(int, least=1),
    "seed": Param(int, most=2**32 - 2),
}
DEFAULT = "default"
_DEFAULTS = TurnOptions()


def set_param(chat: Dialogue, argument: str) -> None:
    name, _, text = argument.partition(" ")
    if not name:
        for known in PARAMS:
            chat.screen.note(_line(chat, known))
        return
    param = PARAMS.get(name.lower())
    if param is None:
        hint = nearest_hint(name, {known: known for known in PARAMS}, "/set lists them.")
        chat.screen.note(f"There is no parameter {name}: {hint}")
        return
    name, text = name.lower(), text.strip()
    if text == DEFAULT:
        chat.sampling.pop(name, None)
    elif text:
        value = param.parse(text)
        if value is None:
            chat.screen.note(f"{name} is {param}, or {DEFAULT}, not {text}.")
            return
        chat.sampling[name] = value
    chat.screen.note(_line(chat, name))


def _line(chat: Dialogue, name: str) -> str:
    """Its value and whose it is."""
    if name in chat.sampling:
        return f"{name} is {chat.sampling[name]:g}."
    if name in chat.model.recommended:
        return f"{name} is {chat.model.recommended[name]:g}, as the model recommends."
    unset = {"max_tokens": "what the context holds", "seed": "chance"}
    return f"{name} is {unset.get(name) or format(getattr(_DEFAULTS, name), 'g')}, by default."
