"""A toy build hook for the tests of the build."""

from pathlib import Path

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
