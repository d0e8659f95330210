"""Preparation of stdin, stdout and stderr."""

import codecs
import io
import os
import sys


def prepare_streams() -> None:
    """Open closed streams on the null device, and let stdout encode any character.

    On Windows, pipes and files receive UTF-8. In UTF-8, undecodable file names are written as their
    bytes. In other encodings, missing characters are escaped.
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
