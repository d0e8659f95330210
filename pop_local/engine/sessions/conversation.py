"""A conversation, which consists of questions, documents, images, and answers."""

from dataclasses import dataclass, replace

from pop_local.engine.chat_messages import Message
from pop_local.engine.images.pictures import Picture
from pop_local.texts.document_readers import Document


@dataclass(frozen=True)
class Turn:
    """A question with its documents and images, and the answer ("" if no answer exists)."""

    question: str
    documents: tuple[Document, ...] = ()
    answer: str = ""
    pictures: tuple[Picture, ...] = ()

    @property
    def prompt(self) -> str:
        """The user message. The question comes last, because the tail runs through all layers."""
        texts = [*(document.text for document in self.documents), self.question]
        return "\n\n".join(text.strip("\n") for text in texts if text.strip())

    @property
    def messages(self) -> list[Message]:
        asked = Message("user", self.prompt, tuple((0, picture) for picture in self.pictures))
        return [asked, Message("assistant", self.answer)] if self.answer else [asked]


@dataclass(frozen=True)
class Conversation:
    """A system prompt (or "") and the turns, oldest first."""

    system: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def messages(self) -> list[Message]:
        preamble = [Message("system", self.system)] if self.system else []
        return preamble + [message for turn in self.turns for message in turn.messages]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Images from all turns, without duplicates."""
        found = {picture.sha256: picture for turn in self.turns for picture in turn.pictures}
        return tuple(found.values())

    def plus(self, turn: Turn) -> "Conversation":
        return replace(self, turns=(*self.turns, turn))

    def without_oldest(self, n_turns: int) -> "Conversation":
        return replace(self, turns=self.turns[n_turns:])

    def without_last(self) -> "Conversation":
        return replace(self, turns=self.turns[:-1])
