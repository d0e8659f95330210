"""The package that builds the backend, made importable, and a toy hook for its tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "patches" / "llama-cpp-python"
sys.path.insert(0, str(PACKAGE))

LINES = [f"line {n}" for n in range(1, 21)]
DIFF = """\
Why this is here.

--- a/src/a.cpp
+++ b/src/a.cpp
@@ -3,4 +3,5 @@ int some_function() {
 line 3
 line 4
-line 5
+line five
+line five and a half
 line 6
@@ -15,3 +16,4 @@
 line 15
 line 16
+hook();
 line 17
"""
PATCHED = [*LINES[:4], "line five", "line five and a half", *LINES[5:16], "hook();", *LINES[16:]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def read(path: Path) -> str:
    return path.read_bytes().decode()
