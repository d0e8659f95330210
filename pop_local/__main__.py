"""`python -m pop_local` is `pop-local`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly, while modules are imported too."""
    try:
        from pop_local.cli import main as obey
        from pop_local.ui.streams import prepare_streams
    except KeyboardInterrupt:
        sys.exit(130)
    prepare_streams()
    obey()


if __name__ == "__main__":
    main()
