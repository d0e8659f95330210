"""Open a session file with the fields of format 3, which version 0.1.0 writes.

The transcript below must never change. If a later version changes a field, it must still read this
transcript. Otherwise it must increase FORMAT, so that the error names the version to use.
"""

import base64
import hashlib
import json
import zipfile

import pytest

from pop_local.engine.images.pictures import picture_of
from pop_local.engine.llama.backend import Mode
from pop_local.engine.sessions.conversation import Conversation, Turn
from pop_local.engine.sessions.session_file import Sessions
from pop_local.texts.document_readers import Document
from support.conversations import opened

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SHA256 = hashlib.sha256(PNG).hexdigest()
TRANSCRIPT = {
    "name": "talk",
    "model": "/models/model.gguf",
    "n_tokens": 0,
    "mode": "CONTEXT",
    "key": "a key",
    "fingerprint": {
        "model_bytes": 1234,
        "model_sha256": "00ff",
        "backend": "0.3.36.1 abi 11",
        "mmproj": "",
    },
    "conversation": {
        "system": "Be brief.",
        "turns": [
            {
                "question": "What is in the file?",
                "documents": [{"name": "notes.txt", "text": "A list.\n"}],
                "answer": "A list.",
                "pictures": [{"name": "dot.png", "sha256": SHA256}],
            },
            {"question": "And now?", "documents": [], "answer": "", "pictures": []},
        ],
    },
    "images": [[3, "an image's key"]],
    "format": 3,
}
SAID = Conversation(
    "Be brief.",
    (
        Turn(
            "What is in the file?",
            (Document("notes.txt", "A list.\n"),),
            "A list.",
            (picture_of(PNG, "dot.png"),),
        ),
        Turn("And now?"),
    ),
)


@pytest.fixture
def saved(sessions: Sessions) -> Sessions:
    path = sessions.path("talk")
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("session.json", json.dumps(TRANSCRIPT))
        archive.writestr(f"pictures/{SHA256}", PNG)
    return sessions


def test_a_session_of_format_3_opens(saved, chat_model):
    [file] = saved.listed()
    assert file.session is not None
    assert (file.session.mode, file.session.images) == (Mode.CONTEXT, ((3, "an image's key"),))
    restored = saved.load("talk", opened(chat_model).engine)
    assert restored.session.conversation == SAID
    assert restored.reread  # another model computed the K/V


def test_this_version_writes_the_same_fields(saved, chat_model):
    saved.save("again", opened(chat_model).engine, SAID)
    with zipfile.ZipFile(saved.path("again")) as archive:
        found = json.loads(archive.read("session.json"))
    assert fields_of(found | {"images": TRANSCRIPT["images"]}) == fields_of(TRANSCRIPT)


def fields_of(value: object) -> object:
    """Replace each text and number by its type."""
    if isinstance(value, dict):
        return {name: fields_of(item) for name, item in value.items()}
    if isinstance(value, list):
        return [fields_of(item) for item in value]
    return type(value)
