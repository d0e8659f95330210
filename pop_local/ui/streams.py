"""Makes stdin, stdout and stderr usable, however a command was started."""

import codecs
import io
import os
import sys


def prepare_streams() -> None:
    """Open a closed stream on the null device, and let stdout take any character.

    On Windows a pipe or a file gets UTF-8. Names that are no text come out as their bytes; a locale
    other than UTF-8 gets escapes for characters that it lacks.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):
        return
    is_chosen = "PYTHONIOENCODING" in os.environ
    if sys.platform == "win32" and not (is_chosen or stdout.isatty()):
        stdout.reconfigure(encoding="utf-8")
    is_utf8 = codecs.lookup(stdout.encoding).name == "utf-8"
    stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
