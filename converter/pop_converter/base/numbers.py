"""Format sizes and times as text."""


def size(n_bytes: int) -> str:
    """Format a byte count in decimal units: 512 B, 1.5 MB."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def duration(seconds: float) -> str:
    """Format an estimated duration to about two significant digits: 40 s, 12 min, 3 h."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.0f} h"
