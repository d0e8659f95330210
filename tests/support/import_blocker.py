"""Code for a child process in which the heavy libraries cannot be imported."""

HEAVY = ("torch", "llama_cpp", "huggingface_hub", "requests")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise AssertionError("help imports " + name)

sys.meta_path.insert(0, Blocker())
"""
