"""The entry point for `python -m pop_local`, which runs the `pop-local` command."""

import codecs
import io
import os
import sys


def main() -> None:
    """Run the command-line app. Ctrl-C exits quietly, even during imports."""
    try:
        from pop_local.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    _prepare_streams()
    run()


def _prepare_streams() -> None:
    """Redirect closed streams to the null device, and make stdout accept any character.

    On Windows, pipes and files receive UTF-8. With UTF-8, undecodable file names keep their
    original bytes. If stdout is not UTF-8, unsupported characters are escaped.
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


if __name__ == "__main__":
    main()
