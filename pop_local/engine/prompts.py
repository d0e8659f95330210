"""From a conversation to the tokens of its prompt, by the model's own chat template."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jinja2 import TemplateError

from converter.errors import PopError
from pop_local.engine.llama.upstream import Jinja2ChatFormatter
from pop_local.engine.pruned import PrunedLlama
from pop_local.engine.turn import Message

# For base models, which come without a template; it needs no special tokens.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}Assistant:"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:")
# Templates of some reasoning models open the block themselves, so that only its end is sampled.
THINK = "<think>"


@dataclass(frozen=True)
class Prompt:
    """Tokens, the strings that end the answer, and what the template has begun of it already."""

    tokens: list[int]
    stops: tuple[str, ...] = ()
    begun: str = ""


class Prompts:
    """A model's chat template, or the plain one, ready to render conversations."""

    def __init__(self, model: PrunedLlama) -> None:
        template = model.metadata.get("tokenizer.chat_template")
        self._model = model
        self._stops = () if template else PLAIN_STOPS
        self._formatter = Jinja2ChatFormatter(
            template=template or PLAIN_TEMPLATE,
            eos_token=self._text_of(model.token_eos()),
            bos_token=self._text_of(model.token_bos()),
        )

    def _text_of(self, token: int) -> str:
        return self._model._model.token_get_text(token) if token != -1 else ""

    def render(self, messages: Sequence[Message]) -> Prompt:
        """Make the prompt, which ends where the answer begins.

        Raises PopError when the template refuses the conversation.
        """
        plain: Any = [asdict(message) for message in messages]
        try:
            text = self._formatter(messages=plain).prompt
        except (ValueError, TemplateError) as error:
            raise PopError(f"the chat template refuses this conversation: {error}") from error
        tokens = self._model.tokenize(text.encode(), add_bos=False, special=True)
        bos = self._model.token_bos()
        if self._model._model.add_bos_token() and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        begun = THINK if text.rstrip().endswith(THINK) else ""
        return Prompt(tokens, self._stops, begun)
