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
    """Format an estimated duration in minutes or hours: 1 minute, 12 minutes, 3 hours."""
    minutes = max(1, round(seconds / 60))
    count, unit = (minutes, "minute") if minutes < 90 else (round(minutes / 60), "hour")
    return f"{count} {unit}{'s' * (count > 1)}"
