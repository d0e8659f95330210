"""Sizes for people."""


def size(n_bytes: int) -> str:
    """Return bytes in decimal units, as download pages and disks give them."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"
