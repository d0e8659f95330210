"""Build models for llama-server's tests, whose own models only a hub provides.

The models are random. Their vocabulary has 1,024 tokens, and their answers consist of words.
"""

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from pop_converter.gguf.header import read_header
from support.converted import converted
from support.filling import FIM
from support.synthetic import TEMPLATE, add_keys, make_gguf

# Common words, with all their beginnings, so that the tests' prompts fit as they do upstream.
_WORDS = (
    "the quick brown fox jumps over lazy dog and of what best book you are coding answer"
    " knowledge date december today write function weather location paris string object type"
    " description name properties required parameters json python"
)
_N_VOCAB = 1024
_N_FIRST = 3 + 256  # special tokens and bytes, which answers never contain
_PLAIN = TEMPLATE.replace("\n", "\n\n")
_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    ),
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}"
    ),
    "command-r": (
        "{% for m in messages %}<|START_OF_TURN_TOKEN|><|"
        "{{ 'CHATBOT' if m['role'] == 'assistant' else m['role'] | upper }}_TOKEN|>"
        "{{ m['content'] }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
}


def stand_in(folder: Path, template: str | None, temperature: float) -> Path:
    """Return a model with a chat template, building it once.

    `template`: the name or the text of the template (None: a plain one). `temperature`: the default
    of requests to the model.
    """
    source = _TEMPLATES.get(template or "", template or _PLAIN)
    name = sha256(f"{source}\0{temperature}".encode()).hexdigest()[:16]
    path = folder / f"{name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            _build(Path(scratch), source, temperature).replace(path)
    return path


def _build(scratch: Path, template: str, temperature: float) -> Path:
    plain = make_gguf(
        scratch / "plain.gguf",
        "llama",
        n_layer=4,
        n_vocab=_N_VOCAB,
        pieces=list(_pieces(_WORDS.split())),
        control=FIM,
        chat_template=template,
    )
    _write_only_words(plain)
    keyed = add_keys(plain, scratch / "keyed.gguf", general__sampling__temp=temperature)
    return converted(keyed, scratch, boundary=2)


def _pieces(words: Iterable[str]) -> Iterable[str]:
    """Yield each word's beginnings, which a SentencePiece vocabulary merges one after the other."""
    seen: set[str] = set()
    for word in words:
        for end in range(2, len(word) + 1):
            if (piece := f"\u2581{word[:end]}") not in seen:
                seen.add(piece)
                yield piece


def _write_only_words(path: Path) -> None:
    """Set the logits of special tokens and bytes to 0, which is far below the 40 highest."""
    header = read_header(path)
    [output] = [tensor for tensor in header.tensors if tensor.name == "output.weight"]
    row_bytes = output.size_bytes // _N_VOCAB
    start = header.data_start + output.offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(_N_FIRST * row_bytes))
        file.seek(start + (_N_VOCAB - len(FIM)) * row_bytes)
        file.write(bytes(len(FIM) * row_bytes))
