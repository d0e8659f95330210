"""Paths in the clone."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
MODELS = ROOT / "models"
PACKAGE = ROOT / "patches" / "llama-cpp-python"
