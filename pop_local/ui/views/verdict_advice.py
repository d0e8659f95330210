"""Verdicts as the command line shows them."""


def with_advice(verdict: str) -> str:
    """Append how to avoid any loss."""
    return f"{verdict} Use --full to be certain."
