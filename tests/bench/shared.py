"""The scripts' part of the tests' support package, made importable, and what that imports."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "patches" / "llama-cpp-python"))

from support.agent_sessions import SESSIONS, requests_of
from support.f32_copy import write_f32
from support.server_requests import BOMB
from support.serving import Served, served
from support.shared_kv import GEMMA4_E2B, add_keys, shapes
from support.synthetic import Recipe, add_header
from support.terminal import Terminal
from support.vision_models import make_vision_model

__all__ = [
    "BOMB",
    "GEMMA4_E2B",
    "SESSIONS",
    "Recipe",
    "Served",
    "Terminal",
    "add_header",
    "add_keys",
    "make_vision_model",
    "requests_of",
    "served",
    "shapes",
    "write_f32",
]
