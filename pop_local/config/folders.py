"""Where the program keeps what it remembers between runs: the history of lines, saved sessions."""

from pathlib import Path

import platformdirs

from pop_local.config import settings


def state_dir() -> Path:
    """Return the folder that is set, else the system's for such things; it need not exist yet."""
    chosen = settings.get("state_dir")
    return Path(str(chosen)) if chosen else platformdirs.user_state_path("pop-local")


def sessions_dir() -> Path:
    """Return where saved sessions lie."""
    return state_dir() / "sessions"


def history_file() -> Path:
    """Return the file that keeps the lines typed in the chat."""
    return state_dir() / "history"
