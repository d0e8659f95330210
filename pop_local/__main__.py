"""`python -m pop_local` runs `pop-local`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C exits quietly even during imports."""
    try:
        from pop_local.cli import main as run
        from pop_local.ui.streams import prepare_streams
    except KeyboardInterrupt:
        sys.exit(130)
    prepare_streams()
    run()


if __name__ == "__main__":
    main()
