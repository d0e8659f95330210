"""The programs' part of the tests' support package, made importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "patches" / "llama-cpp-python"))

from support.f32_copy import write_f32
from support.serving import Served, served

__all__ = ["Served", "served", "write_f32"]
