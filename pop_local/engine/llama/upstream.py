"""llama_cpp's Python classes, to be imported from here: what keeps it from loading is explained."""

from pop_local.engine.llama.backend import bindings

api = bindings()

import llama_cpp  # noqa: E402
import llama_cpp.llama_chat_format as chat_format  # noqa: E402
from llama_cpp import Llama, LlamaGrammar  # noqa: E402
from llama_cpp.llama import LlamaState  # noqa: E402
from llama_cpp.llama_cache import BaseLlamaCache, LlamaRAMCache  # noqa: E402
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402

__all__ = [
    "BaseLlamaCache",
    "Jinja2ChatFormatter",
    "Llama",
    "LlamaGrammar",
    "LlamaRAMCache",
    "LlamaState",
    "api",
    "chat_format",
    "llama_cpp",
]
