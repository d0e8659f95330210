"""`python -m pop_local` is `pop-local`."""

from pop_local.cli import main

if __name__ == "__main__":
    main()
